"""Reports, and their text in four formats: a table for people, markdown, and JSON and CSV with raw numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from powerplan.choices import Format

MOST_WIDTH = 100
"""Characters of a table from which on texts are folded."""


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


@dataclass(frozen=True)
class Report:
    """A result that is ready to print.

    schema: the name and version of the JSON. payload: the rest of the JSON. columns, rows: the table, with raw values.
    before, after: lines around the table. sections: reports whose tables are printed, one after another, instead of
    this one's; JSON and CSV are always this one's.
    """

    schema: str
    payload: dict[str, Any]
    columns: Sequence[Column]
    rows: Sequence[dict[str, Any]]
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    sections: Sequence[Report] = ()


def render(report: Report, form: Format) -> str:
    """Return the text of a report, without a trailing newline."""
    match form:
        case "json":
            return json.dumps({"schema": report.schema, **report.payload}, indent=2, allow_nan=False)
        case "csv":
            return _csv(report)
        case "table" | "markdown":
            return _text(report, form)
    assert_never(form)


def _text(report: Report, form: Literal["table", "markdown"]) -> str:
    if report.sections:
        return "\n\n".join(_text(section, form) for section in report.sections)
    if not report.rows:
        return "\n".join([*report.before, *report.after])
    table = table_of(report.columns, report.rows, "pipe" if form == "markdown" else "simple")
    return "\n\n".join(filter(None, ("\n".join(report.before), table, "\n".join(report.after))))


def _csv(report: Report) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.key for column in report.columns])
    writer.writerows([plain(row.get(column.key)) for column in report.columns] for row in report.rows)
    return buffer.getvalue().rstrip("\n")


def table_of(columns: Sequence[Column], rows: Sequence[dict[str, Any]], tablefmt: str = "simple") -> str:
    """Return the text of a table. Headings and texts have several lines where tablefmt is "simple", else one."""
    from tabulate import tabulate

    shown = [column for column in columns if not column.raw]
    headings = [column.heading for column in shown]
    if tablefmt != "simple":  # Words that a line break divides become whole.
        headings = [heading.replace("-\n", "").replace("\n", " ") for heading in headings]
    cells = [[column.show(row.get(column.key)) for column in shown] for row in rows]

    def text() -> str:
        return tabulate(
            cells,
            headers=headings,
            tablefmt=tablefmt,
            colalign=["left" if column.left else "right" for column in shown] if rows else None,
            disable_numparse=True,
        )

    table = text()
    for place, column in enumerate(shown if tablefmt == "simple" else ()):
        over = max(map(len, table.splitlines())) - MOST_WIDTH
        if column.fold and over > 0:
            most = max(len(row[place]) for row in cells) - over
            for row in cells:
                row[place] = _folded(row[place], column.fold, most)
            table = text()
    return table


def _folded(text: str, fold: str, most: int) -> str:
    """Return a text with a line break before the last `fold` that lets its first line be `most` characters or fewer."""
    place = text.rfind(fold, 1, most + len(fold)) if len(text) > most else -1
    place = text.find(fold, 1) if place < 0 and len(text) > most else place
    return text if place < 0 else f"{text[:place]}\n{text[place:]}"
