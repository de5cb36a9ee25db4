"""Printing: results go to stdout, notes and errors to stderr, in colour on a terminal unless NO_COLOR is set."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from powerplan.choices import Format
from powerplan.errors import one_line
from powerplan.report.colour import colour
from powerplan.report.render import Report, render

if TYPE_CHECKING:
    from powerplan.answers.base import Answer


def coloured(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose user has not asked for plain text (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _marked(stream: TextIO, mark: str, code: str) -> str:
    return f"\033[{code}m{mark}\033[0m" if coloured(stream) else mark


def error(text: str) -> None:
    sys.stderr.write(f"{_marked(sys.stderr, 'error:', '1;31')} {one_line(text)}\n")


def note(text: str) -> None:
    sys.stderr.write(f"{_marked(sys.stderr, 'note:', '36')} {one_line(text)}\n")


def show(report: Report, form: Format) -> None:
    """Print a report on stdout."""
    with colour(coloured(sys.stdout)):
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
    sys.stdout.write(body if body.endswith("\n") else f"{body}\n")
