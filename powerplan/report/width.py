"""How wide text may be: the terminal's columns, or a width that suits files and pipes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

LINE = 98
"""Longest line of text, in characters, where there is no terminal."""

TABLE = 100
"""Widest table where there is no terminal."""

NARROWEST = 60
"""Columns of a terminal from which on output is made to fit; a narrower one breaks the lines itself."""

_columns: ContextVar[int | None] = ContextVar("columns", default=None)


@contextmanager
def terminal(columns: int | None) -> Iterator[None]:
    """Let text and tables inside a `with` block fit so many columns; None where there is no terminal."""
    token = _columns.set(None if columns is None else max(columns, NARROWEST))
    try:
        yield
    finally:
        _columns.reset(token)


def line_width() -> int:
    """Return how many characters a line of text may have: at most LINE, which is easy to read."""
    columns = _columns.get()
    return LINE if columns is None else min(columns, LINE)


def table_width() -> int | None:
    """Return how many characters a line of a table may have; None where there is no terminal that it must fit."""
    return _columns.get()


def wrapped(text: str, head: str = "", indent: int | None = None) -> list[str]:
    """Return the lines of a text: the first begins with `head`, the others with `indent` spaces, by default as many.

    Lines end between words only: neither a name such as llama-3-8b nor a number is divided.
    """
    rest = " " * min(len(head) if indent is None else indent, NARROWEST // 3)
    return textwrap.wrap(
        text, line_width(), initial_indent=head, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def command_lines(command: str, indent: str = "") -> list[str]:
    """Return a command in lines that a shell takes as one: a line that goes on ends with a backslash."""
    import shlex  # Only recommend prints commands.

    words = [shlex.quote(word) for word in shlex.split(command)]
    lines = [indent]
    for word in _with_values(words):
        gap = "" if not lines[-1].strip() else " "
        if gap and len(lines[-1]) + len(f"{gap}{word} \\") > line_width():
            lines[-1] += " \\"
            lines.append(f"{indent}  {word}")
        else:
            lines[-1] += gap + word
    return lines


def _with_values(words: Sequence[str]) -> list[str]:
    """Return the words of a command, each option together with its value."""
    together: list[str] = []
    for previous, word in zip(["", *words], words, strict=False):
        if previous.startswith("--") and not word.startswith("--"):
            together[-1] += f" {word}"
        else:
            together.append(word)
    return together


def fitted(lines: Sequence[str]) -> list[str]:
    """Return lines with those wrapped that a terminal has no room for; what is indented stays so."""
    columns = table_width()
    if columns is None:
        return list(lines)
    return [part for line in lines for part in _fitted(line, columns)]


def _fitted(line: str, columns: int) -> list[str]:
    if len(line) <= columns:
        return [line]
    start = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line, columns, subsequent_indent=start, break_on_hyphens=False, break_long_words=False)
