"""Texts in columns, as the package tabulate lays them out, whose import takes as long as an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MARGIN = 2
"""A column is so many characters wider than its heading at least, where there is room."""


def grid(
    headings: Sequence[str],
    columns: Sequence[Sequence[str]],
    left: Sequence[bool],
    markdown: bool = False,
    margin: int = MARGIN,
) -> str:
    """Return a table as text.

    Args:
        headings: What stands above each column. Headings and texts may have several lines.
        columns: The texts of each column, equally many.
        left: Whether each column is aligned to the left; else it is to the right.
        markdown: Whether to draw bars around the cells; else there is a rule below the headings alone.
        margin: How many characters a column is wider than its heading at least.
    """
    cells = [
        [heading.split("\n"), *(text.strip().splitlines() for text in texts)]
        for heading, texts in zip(headings, columns, strict=True)
    ]
    widths = [
        max(max(map(len, column[0])) + margin, *(len(line) for cell in column for line in cell)) for column in cells
    ]
    head, *rows = ([*row] for row in zip(*cells, strict=True))
    if markdown:
        dashes = ["-" * (width + 1) for width in widths]
        rule = f"|{'|'.join(f':{own}' if to_left else f'{own}:' for own, to_left in zip(dashes, left, strict=True))}|"
    else:
        rule = "  ".join("-" * width for width in widths)
    printed = [list(_lines(row, widths, left, markdown)) for row in (head, *rows)]
    return "\n".join((*printed[0], rule, *(line for row in printed[1:] for line in row)))


def _lines(row: Sequence[Sequence[str]], widths: Sequence[int], left: Sequence[bool], markdown: bool) -> Iterable[str]:
    """Yield the lines of a row, whose cells are lists of lines."""
    for place in range(max(map(len, row)) or 1):
        texts = [cell[place] if place < len(cell) else "" for cell in row]
        padded = [
            text.ljust(width) if to_left else text.rjust(width)
            for text, width, to_left in zip(texts, widths, left, strict=True)
        ]
        yield f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()
