"""Tables as text. One that is too wide for the terminal gets narrower texts, and then stands in parts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from powerplan.report.grid import grid
from powerplan.report.width import TABLE, table_width

NARROW_TEXT = 16
"""Characters that the texts of a left-aligned column keep at least, where a table has to become narrower."""


def plain(value: Any) -> str:
    """Show a value as it is, a list with semicolons; nothing for None."""
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return "" if value is None else str(value)


def grouped(value: Any) -> str:
    """Show an integer with thousands separators."""
    return "" if value is None else f"{value:,}"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    key: where each row holds the raw value. heading: what stands above, in one line or more. show: the text that a
    person sees in place of the value. left: whether the texts are aligned to the left. fold: what its texts may be
    broken before where the table is wide. raw: whether CSV alone has it.
    """

    key: str
    heading: str
    show: Callable[[Any], str] = plain
    left: bool = False
    fold: str = ""
    raw: bool = False


@dataclass
class _Cells:
    """A column with the texts of its cells; heading and texts may have several lines."""

    column: Column
    heading: str
    texts: list[str]

    @property
    def width(self) -> int:
        return max(len(line) for text in (self.heading, *self.texts) for line in text.split("\n"))


def table_of(columns: Sequence[Column], rows: Sequence[dict[str, Any]], tablefmt: str = "simple") -> str:
    """Return the text of a table. Headings and texts have several lines where tablefmt is "simple", else one.

    A simple table fits the terminal, if there is one: texts are folded, then wrapped at words, and columns that still
    have no room stand below in a table of their own, beside the first columns again.
    """
    cells = [
        _Cells(column, column.heading, [column.show(row.get(column.key)) for row in rows])
        for column in columns
        if not column.raw
    ]
    if tablefmt != "simple":  # Words that a line break divides become whole.
        for own in cells:
            own.heading = own.heading.replace("-\n", "").replace("\n", " ")
        return _text(cells, tablefmt)
    terminal = table_width()
    _fold(cells, TABLE if terminal is None else terminal)
    if terminal is None:
        return _text(cells, tablefmt)
    _narrow(cells, terminal)
    return "\n\n".join(_text(part, tablefmt) for part in _parts(cells, terminal))


def _text(cells: Sequence[_Cells], tablefmt: str) -> str:
    headings, texts = [own.heading for own in cells], [own.texts for own in cells]
    return grid(headings, texts, [own.column.left for own in cells], markdown=tablefmt == "pipe")


def _width(cells: Sequence[_Cells]) -> int:
    """Return the characters of the longest line; with the gaps between columns."""
    return max(map(len, _text(cells, "simple").splitlines()))


def _fold(cells: Sequence[_Cells], most: int) -> None:
    """Break texts before the `fold` of their column, where the table is too wide."""
    for own in cells:
        over = _width(cells) - most
        if own.column.fold and over > 0:
            own.texts = [_folded(text, own.column.fold, own.width - over) for text in own.texts]


def _folded(text: str, fold: str, most: int) -> str:
    """Return a text with a line break before the last `fold` that lets its first line be `most` characters or fewer."""
    place = text.rfind(fold, 1, most + len(fold)) if len(text) > most else -1
    place = text.find(fold, 1) if place < 0 and len(text) > most else place
    return text if place < 0 else f"{text[:place]}\n{text[place:]}"


def _narrow(cells: Sequence[_Cells], most: int) -> None:
    """Wrap headings and then left-aligned texts at words, the widest column first, while the table is too wide."""
    for own in sorted(cells, key=lambda own: -own.width):
        if _width(cells) > most:
            inner = max((len(line) for text in own.texts for line in text.split("\n")), default=0)
            own.heading = _wrapped(own.heading, max(inner, 6))
    for own in sorted(cells, key=lambda own: -own.width):
        room = own.width
        while own.column.left and room > NARROW_TEXT and (over := _width(cells) - most) > 0:
            room = max(room - over, NARROW_TEXT)  # A long word can keep a text wider than its room.
            own.texts = [_wrapped(text, room) for text in own.texts]


def _wrapped(text: str, width: int) -> str:
    lines = (
        textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""] for line in text.split("\n")
    )
    return "\n".join(part for own in lines for part in own)


def _parts(cells: Sequence[_Cells], most: int) -> list[list[_Cells]]:
    """Return the columns in tables that fit. Each begins with the columns that name its rows."""
    if _width(cells) <= most:
        return [list(cells)]
    names = _names(cells, most)
    parts = [[*names]]
    for own in cells[len(names) :]:
        if len(parts[-1]) > len(names) and _width([*parts[-1], own]) > most:
            parts.append([*names])
        parts[-1].append(own)
    return parts


def _names(cells: Sequence[_Cells], most: int) -> Sequence[_Cells]:
    """Return the first columns, up to the last left-aligned one of three, where every other has room beside them."""
    for count in (3, 2):
        names, others = cells[:count], cells[count:]
        if others and names[-1].column.left and all(_width([*names, own]) <= most for own in others):
            return names
    return cells[:1]
