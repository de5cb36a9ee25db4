"""Standard streams that are closed, full, or of few characters: none of them costs a result or gives a traceback."""

from __future__ import annotations

import io
import os
import shutil
import sys
from contextlib import suppress
from typing import TextIO


class Unfailing(io.TextIOWrapper):
    """A stream whose text is dropped where it cannot be written: what goes wrong with notes is not the result's."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            abandon(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            abandon(self)


def prepare() -> None:
    """Make the standard streams safe to write to.

    Closed ones (`>&-`) lead to the null device: the number of a closed stream would go to the next file that is opened,
    and libraries write to numbers. A character that a stream's encoding lacks is written as an escape.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Takes the lowest number that is free, which is this one.
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    elif isinstance(sys.stderr, io.TextIOWrapper):
        encoding = sys.stderr.encoding
        sys.stderr = Unfailing(sys.stderr.buffer, encoding, "backslashreplace", line_buffering=True)


def columns(stream: TextIO | None = None) -> int | None:
    """Return how many characters a line of the terminal has that `stream`, or stdout, is; None where it is none."""
    if not (stream or sys.stdout).isatty():
        return None
    asked = os.environ.get("COLUMNS", "")
    if stream is not None and not asked.isdecimal():  # Python's own function asks stdout, which may be a file.
        with suppress(OSError, ValueError):
            return os.get_terminal_size(stream.fileno()).columns or None
    return shutil.get_terminal_size().columns


def abandon(stream: TextIO) -> None:
    """Point a stream at the null device, as Python flushes it once more at its end and cannot write what is left."""
    with suppress(OSError, ValueError):  # A stream of tests has no number.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
