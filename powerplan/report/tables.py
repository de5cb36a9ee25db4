"""Tables as text. One that is too wide for the terminal gets narrower texts, and then stands in parts."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from powerplan.report.colour import Role, in_colour, painted
from powerplan.report.grid import MARGIN, grid
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
    broken before where the table is wide. raw: whether CSV alone has it. role: how a value is coloured, if at all.
    """

    key: str
    heading: str
    show: Callable[[Any], str] = plain
    left: bool = False
    fold: str = ""
    raw: bool = False
    role: Callable[[Any], Role | None] = lambda value: None


@dataclass
class _Cells:
    """A column with the texts of its cells and their roles; heading and texts may have several lines."""

    column: Column
    heading: str
    texts: list[str]
    roles: list[tuple[Role | None, ...]]

    @property
    def width(self) -> int:
        return max(len(line) for text in (self.heading, *self.texts) for line in text.split("\n"))


def table_of(
    columns: Sequence[Column],
    rows: Sequence[dict[str, Any]],
    markdown: bool = False,
    strong: Callable[[dict[str, Any]], bool] = lambda row: False,
) -> str:
    """Return the text of a table. Headings and texts of one in markdown have one line, those of a simple one several.

    A simple table fits the terminal, if there is one: texts are folded, columns move together, texts are wrapped at
    words, and columns that still have no room stand below in a table of their own, beside the first columns again.
    strong: which of its rows stand out where text has colour.
    """
    marks: list[Role | None] = ["strong" if strong(row) else None for row in rows]
    cells = [
        _Cells(
            column,
            column.heading,
            [column.show(row.get(column.key)) for row in rows],
            [(column.role(row.get(column.key)), mark) for row, mark in zip(rows, marks, strict=True)],
        )
        for column in columns
        if not column.raw
    ]
    if markdown:  # Words that a line break divides become whole.
        for own in cells:
            own.heading = own.heading.replace("-\n", "").replace("\n", " ")
        return _text(cells, markdown=True)
    terminal = table_width()
    _fold(cells, TABLE if terminal is None else terminal)
    if terminal is None:
        fit = (margin for margin in range(MARGIN, -1, -1) if _width(cells, margin) <= TABLE)
        return _painted(cells, next(fit, MARGIN))
    if _width(cells, 0) > terminal:
        _narrow(cells, terminal)
    margin = min(range(MARGIN, -1, -1), key=lambda margin: len(_parts(cells, terminal, margin)))
    return "\n\n".join(_painted(part, margin) for part in _parts(cells, terminal, margin))


def _painted(cells: Sequence[_Cells], margin: int) -> str:
    """Return a simple table: its text, and colour where there is some."""
    text = _text(cells, margin)
    if not in_colour():
        return text
    lines = text.split("\n")
    rule = next(place for place, line in enumerate(lines) if line and set(line) <= {"-", " "})
    spans = [part.span() for part in re.finditer("-+", lines[rule])]
    spans[-1] = (spans[-1][0], max(map(len, lines)))
    heading: list[tuple[Role | None, ...]] = [("strong",)] * len(cells)
    ruled: list[tuple[Role | None, ...]] = [("quiet",)] * len(cells)
    roles = [*[heading] * rule, ruled]
    for row in range(len(cells[0].texts)):
        height = max(own.texts[row].count("\n") for own in cells) + 1
        roles += [[own.roles[row] for own in cells]] * height
    return "\n".join(_painted_line(line, spans, own) for line, own in zip(lines, roles, strict=True))


def _painted_line(line: str, spans: Sequence[tuple[int, int]], roles: Sequence[tuple[Role | None, ...]]) -> str:
    """Return a line of a table with the piece in each span in the roles of its column."""
    for (start, end), own in reversed(list(zip(spans, roles, strict=True))):
        line = line[:start] + painted(line[start:end], *own) + line[end:]
    return line


def _text(cells: Sequence[_Cells], margin: int = MARGIN, markdown: bool = False) -> str:
    headings, texts = [own.heading for own in cells], [own.texts for own in cells]
    return grid(headings, texts, [own.column.left for own in cells], markdown, margin)


def _width(cells: Sequence[_Cells], margin: int = MARGIN) -> int:
    """Return the characters of the longest line; with the gaps between columns."""
    return max(map(len, _text(cells, margin).splitlines()))


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


def _parts(cells: Sequence[_Cells], most: int, margin: int) -> list[list[_Cells]]:
    """Return the columns in tables that fit. Each begins with the columns that name its rows."""
    if _width(cells, margin) <= most:
        return [list(cells)]
    names = _names(cells, most, margin)
    parts = [[*names]]
    for own in cells[len(names) :]:
        if len(parts[-1]) > len(names) and _width([*parts[-1], own], margin) > most:
            parts.append([*names])
        parts[-1].append(own)
    return parts


def _names(cells: Sequence[_Cells], most: int, margin: int) -> Sequence[_Cells]:
    """Return the first columns, up to the last left-aligned one of three, where every other has room beside them."""
    for count in (3, 2):
        names, others = cells[:count], cells[count:]
        if others and names[-1].column.left and all(_width([*names, own], margin) <= most for own in others):
            return names
    return cells[:1]
