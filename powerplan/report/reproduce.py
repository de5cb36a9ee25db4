"""`powerplan reproduce`: each set of published figures as a table of its own, all as one in JSON and CSV."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from powerplan.report.render import Column, Report
from powerplan.reproduce import Comparison, Figure, SetResult
from powerplan.units import json_number

SCHEMA = "powerplan.reproduce/1"
WIDTH = 98
WIDEST = 5
"""Conventions that stand side by side; more of them stand below each other."""

AGREES = "*"


def reproduce_report(results: Sequence[SetResult]) -> Report:
    """Return the report of the compared sets."""
    payload = {"sets": [_set(result) for result in results]}
    rows = [
        {
            "set": result.figures.name,
            "figure": item.figure.key,
            "unit": item.figure.unit,
            "published": json_number(item.figure.number),
            "convention": name,
            "computed": json_number(value),
            "agrees": name in item.agrees,
        }
        for result in results
        for item in result.comparisons
        for name, value in item.computed.items()
    ]
    columns = [Column(key, key) for key in ("set", "figure", "unit", "published", "convention", "computed", "agrees")]
    return Report(SCHEMA, payload, columns, rows, sections=[_section(result) for result in results])


def _set(result: SetResult) -> dict[str, Any]:
    return {
        "name": result.figures.name,
        "title": result.figures.title,
        "source": result.figures.source,
        "conventions": result.figures.conventions,
        "agreeing": {name: result.agreeing(name)[0] for name in result.figures.conventions},
        "why": result.figures.why,
        "remarks": result.remarks(),
        "figures": [_figure(item, result.figures.source) for item in result.comparisons],
    }


def _figure(item: Comparison, source: str) -> dict[str, Any]:
    figure, (nearest, gap) = item.figure, item.nearest
    return {
        "key": figure.key,
        "what": figure.what,
        "unit": figure.unit,
        "published": json_number(figure.number),
        "printed": figure.printed(),
        "source": figure.source or source,
        "computed": {name: json_number(value) for name, value in item.computed.items()},
        "agrees": item.agrees,
        "nearest": nearest,
        "gap": gap,
    }


def _section(result: SetResult) -> Report:
    figures = result.figures
    before = [*_wrapped(f"{figures.name}: {figures.title}"), *_wrapped(f"published in: {figures.source}")]
    named = list(figures.conventions)
    wide = len(named) <= WIDEST
    rows = [row for item in result.comparisons for row in ([_wide(item)] if wide else _long(item))]
    columns = [Column("what", "figure", left=True), Column("published", "pub-\nlished")]
    if wide:
        columns += [Column(name, name) for name in named]
    else:
        columns += [Column("computed", "computed"), Column("convention", "as", left=True)]
    columns.append(Column("gap", "nearest", left=False))
    after = _wrapped(f"{AGREES} prints as published: {_counts(result) if wide else _count(result)}. {figures.why}")
    after += [line for remark in result.remarks() for line in _wrapped(remark)]
    for name, meaning in figures.conventions.items():
        after += textwrap.wrap(f"{name}: {meaning}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    return Report(SCHEMA, {}, columns, rows, before=before, after=after)


def _counts(result: SetResult) -> str:
    hits = [(name, *result.agreeing(name)) for name in result.figures.conventions]
    return ", ".join(f"{name} {agreeing} of {values}" for name, agreeing, values in hits)


def _count(result: SetResult) -> str:
    return f"{sum(bool(item.agrees) for item in result.comparisons)} of {len(result.comparisons)} figures"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def _cell(figure: Figure, value: Fraction, agrees: bool) -> str:
    """Return a computed value with more digits than are published, marked where it prints the same."""
    whole = figure.unit != "ratio" and value.denominator == 1
    digits = 0 if whole else figure.decimals + 1 if figure.unit in ("ratio", "x") else max(2, figure.decimals)
    text = figure.show(value, digits)
    for unit in (" %", " GB", "B"):
        text = text.removesuffix(unit)
    return f"{text} {AGREES if agrees else ' '}"


def _gap(item: Comparison) -> str:
    """Return by how much the nearest value misses, where none agrees."""
    gap = item.nearest[1]
    if item.agrees:
        return ""
    if abs(gap) < 1e-3:
        return "under 0.1%"
    return f"{gap:+.1%}" if abs(gap) < 0.1 else f"{gap:+.0%}"


def _wide(item: Comparison) -> dict[str, Any]:
    agreeing = item.agrees
    row: dict[str, Any] = {"what": item.figure.what, "published": item.figure.printed()}
    if not agreeing:
        row["gap"] = f"{item.nearest[0]} {_gap(item)}"
    return row | {name: _cell(item.figure, value, name in agreeing) for name, value in item.computed.items()}


def _long(item: Comparison) -> list[dict[str, Any]]:
    agreeing, rows = item.agrees, []
    for place, (name, value) in enumerate(item.computed.items()):
        row = {"computed": _cell(item.figure, value, name in agreeing), "convention": name}
        if not place:
            row |= {"what": item.figure.what, "published": item.figure.printed()}
        if name == item.nearest[0]:
            row["gap"] = _gap(item)
        rows.append(row)
    return rows
