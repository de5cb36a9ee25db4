"""Reports, and their text in four formats: a table for people, markdown, and JSON and CSV with raw numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from powerplan.choices import Format
from powerplan.report.tables import Column, plain, table_of
from powerplan.report.width import fitted


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
    before, after = "\n".join(fitted(report.before)), "\n".join(fitted(report.after))
    if not report.rows:
        return "\n".join(filter(None, (before, after)))
    table = table_of(report.columns, report.rows, "pipe" if form == "markdown" else "simple")
    return "\n\n".join(filter(None, (before, table, after)))


def _csv(report: Report) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.key for column in report.columns])
    writer.writerows([plain(row.get(column.key)) for column in report.columns] for row in report.rows)
    return buffer.getvalue().rstrip("\n")
