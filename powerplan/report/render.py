"""Reports, and their text in four formats: a table for people, markdown, and JSON and CSV with raw numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from powerplan.choices import Format
from powerplan.report.colour import Role, colour, painted
from powerplan.report.tables import Column, plain, table_of
from powerplan.report.width import command_lines, fitted, wrapped


@dataclass(frozen=True)
class Report:
    """A result that is ready to print.

    schema: the name and version of the JSON. payload: the rest of the JSON. columns, rows: the table, with raw values.
    strong: the rows that stand out where text has colour.
    Above the table: title, what it is about; before, lines; block, labels and what is said of each, a list where that
    is commands; legend, lines that explain the table. Below it: after, lines; verdict, lines of what it comes to.
    sections: reports whose tables are printed, one after another, instead of this one's; JSON and CSV are always this
    one's.
    """

    schema: str
    payload: dict[str, Any]
    columns: Sequence[Column]
    rows: Sequence[dict[str, Any]]
    title: Sequence[str] = ()
    before: Sequence[str] = ()
    block: Sequence[tuple[str, str | Sequence[str]]] = ()
    legend: Sequence[str] = ()
    after: Sequence[str] = ()
    verdict: Sequence[str] = ()
    strong: Callable[[dict[str, Any]], bool] = lambda row: False
    sections: Sequence[Report] = ()


def render(report: Report, form: Format) -> str:
    """Return the text of a report, without a trailing newline."""
    match form:
        case "json":
            return json.dumps({"schema": report.schema, **report.payload}, indent=2, allow_nan=False)
        case "csv":
            return _csv(report)
        case "table":
            return _text(report, form)
        case "markdown":
            with colour(False):  # A document, also where it is printed on a terminal.
                return _text(report, form)
    assert_never(form)


def _text(report: Report, form: Literal["table", "markdown"]) -> str:
    if report.sections:
        return "\n\n".join(_text(section, form) for section in report.sections)
    parts = [*filter(None, (_lines(report.title, "strong"), _lines(report.before)))]
    legend = _lines(report.legend, "quiet")
    if report.block:
        parts = ["\n".join(parts), _block(report.block, form), legend]
    else:
        parts = ["\n".join(filter(None, (*parts, legend)))]
    if report.rows:
        parts.append(table_of(report.columns, report.rows, form == "markdown", report.strong))
    parts += [_lines(report.after), _lines(report.verdict, "strong")]
    return "\n\n".join(filter(None, parts))


def _lines(lines: Sequence[str], role: Role | None = None) -> str:
    return "\n".join(painted(line, role) for line in fitted(lines))


def _block(block: Sequence[tuple[str, str | Sequence[str]]], form: Literal["table", "markdown"]) -> str:
    """Return labels and what is said of each: in a column of their own, or as a list of markdown."""
    if form == "markdown":
        texts = [(label, [text] if isinstance(text, str) else [f"`{line}`" for line in text]) for label, text in block]
        return "\n".join(f"- **{label}:** {'; '.join(lines)}" for label, lines in texts)
    width = max((len(label) for label, _ in block), default=0) + 3
    lines = []
    for label, text in block:
        own = wrapped(text, " " * width) if isinstance(text, str) else []
        own += [] if isinstance(text, str) else [line for one in text for line in command_lines(one, " " * width)]
        own[0] = f"{painted(f'{label}:', 'strong')}{own[0][len(label) + 1 :]}"
        lines += own
    return "\n".join(lines)


def _csv(report: Report) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.key for column in report.columns])
    writer.writerows([plain(row.get(column.key)) for column in report.columns] for row in report.rows)
    return buffer.getvalue().rstrip("\n")
