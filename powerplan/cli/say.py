"""Printing: results go to stdout, notes and errors to stderr, in colour on a terminal unless NO_COLOR is set."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TextIO

from powerplan.choices import Format
from powerplan.cli.streams import columns
from powerplan.errors import one_line
from powerplan.report.colour import colour
from powerplan.report.render import Report, render
from powerplan.report.width import fitted, terminal

if TYPE_CHECKING:
    from powerplan.answers.base import Answer


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_into: ContextVar[list[str] | None] = ContextVar("into", default=None)


@contextmanager
def asked(quiet: bool | None = None, into: list[str] | None = None) -> Iterator[None]:
    """Leave notes out inside a `with` block, or append to `into` what stdout would get; None changes nothing."""
    was_quiet = _quiet.set(_quiet.get() if quiet is None else quiet)
    was_into = _into.set(_into.get() if into is None else into)
    try:
        yield
    finally:
        _quiet.reset(was_quiet)
        _into.reset(was_into)


def quiet() -> bool:
    """Whether the user wants errors alone on stderr."""
    return _quiet.get()


@contextmanager
def plain(arguments: Sequence[str]) -> Iterator[None]:
    """Set NO_COLOR inside a `with` block where --no-color is among the arguments: libraries look at it too.

    Before the arguments are parsed, as help and errors are coloured that are printed while they are.
    """
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    before = os.environ.get("NO_COLOR")
    if "--no-color" in options:
        os.environ["NO_COLOR"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("NO_COLOR", None)
        else:
            os.environ["NO_COLOR"] = before


def coloured(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose user has not asked for plain text (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _marked(stream: TextIO, mark: str, code: str) -> str:
    return f"\033[{code}m{mark}\033[0m" if coloured(stream) else mark


def error(text: str) -> None:
    """Print an error on stderr."""
    _tell("error:", "1;31", text)


def note(text: str) -> None:
    """Print a note on stderr, unless the user wants errors alone."""
    if not _quiet.get():
        _tell("note:", "36", text)


def _tell(mark: str, code: str, text: str) -> None:
    """Print a text after a mark on stderr: in one line, or in lines of whole words where stderr is a terminal."""
    told = f"{mark} {one_line(text)}"
    if (width := columns(sys.stderr)) is not None:
        with terminal(width):
            told = "\n".join(fitted([told]))
    sys.stderr.write(f"{_marked(sys.stderr, mark, code)}{told.removeprefix(mark)}\n")


def show(report: Report, form: Format) -> None:
    """Print a report on stdout."""
    with colour(coloured(sys.stdout) and _into.get() is None):
        body = render(report, form)
    text(body)


def answer(answered: Answer, form: Format, notes: Sequence[str] = ()) -> None:
    """Print `notes` and those of an answer on stderr, and its report on stdout."""
    report = answered.report  # What is wrong is said before any note.
    for remark in (*notes, *answered.notes):
        note(remark)
    show(report, form)


def text(body: str) -> None:
    """Print `body` on stdout, with a newline at its end."""
    whole, into = body if body.endswith("\n") else f"{body}\n", _into.get()
    if into is None:
        sys.stdout.write(whole)
    else:
        into.append(whole)
