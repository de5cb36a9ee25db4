"""Reports, and their text in four formats: a table for people, markdown, and JSON and CSV with raw numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from powerplan.choices import Format


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
    person sees in place of the value. left: whether the texts are aligned to the left.
    """

    key: str
    heading: str
    show: Callable[[Any], str] = plain
    left: bool = False


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
    """Return the text of a table. Headings have several lines where tablefmt is "simple", else one."""
    from tabulate import tabulate

    headings = [column.heading for column in columns]
    if tablefmt != "simple":  # Words that a line break divides become whole.
        headings = [heading.replace("-\n", "").replace("\n", " ") for heading in headings]
    return tabulate(
        [[column.show(row.get(column.key)) for column in columns] for row in rows],
        headers=headings,
        tablefmt=tablefmt,
        colalign=["left" if column.left else "right" for column in columns] if rows else None,
        disable_numparse=True,
    )
