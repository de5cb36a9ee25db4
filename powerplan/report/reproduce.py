"""`powerplan reproduce`: a table for each set of published figures; JSON and CSV hold all sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.reproduce import Comparison, Figure, SetResult
from powerplan.units import json_number

SCHEMA = "powerplan.reproduce/1"

MOST_COLUMNS = 5
"""Up to this many conventions are columns of the table; more of them are rows."""

AGREES = "*"
"""Marks a computed value that prints as the published one."""


def reproduce_report(results: Sequence[SetResult]) -> Report:
    """Return the report of these sets: one section for each, and all of them as one payload and one list of rows."""
    payload = {"sets": [_set(result) for result in results]}
    rows = [
        {
            "set": result.figures.name,
            "figure": comparison.figure.key,
            "unit": comparison.figure.unit,
            "published": json_number(comparison.figure.number),
            "convention": name,
            "computed": json_number(value),
            "agrees": name in comparison.agrees,
        }
        for result in results
        for comparison in result.comparisons
        for name, value in comparison.computed.items()
    ]
    columns = [Column(key, key) for key in ("set", "figure", "unit", "published", "convention", "computed", "agrees")]
    sections = [*([_overview(results)] if len(results) > 1 else []), *map(_section, results)]
    return Report(SCHEMA, payload, columns, rows, sections=sections)


def _overview(results: Sequence[SetResult]) -> Report:
    """Return a line for each set: how many of its figures some convention prints as published."""
    columns = [
        Column("set", "set", left=True),
        Column("agree", "agree", grouped),
        Column("figures", "figures", grouped),
        Column("title", "what is published", left=True),
    ]
    rows = [
        {
            "set": result.figures.name,
            "agree": sum(bool(comparison.agrees) for comparison in result.comparisons),
            "figures": len(result.comparisons),
            "title": re.split(r"[:,;]| \(", result.figures.title)[0],
        }
        for result in results
    ]
    legend = wrapped(
        "agree: figures that a convention of their set prints as published; the gaps of others stand below. powerplan "
        "reproduce SET has one alone."
    )
    return Report(SCHEMA, {}, columns, rows, legend=legend)


def _set(result: SetResult) -> dict[str, Any]:
    return {
        "name": result.figures.name,
        "title": result.figures.title,
        "source": result.figures.source,
        "conventions": result.figures.conventions,
        "agreeing": {name: result.agreeing(name)[0] for name in result.figures.conventions},
        "why": result.figures.why,
        "remarks": result.remarks(),
        "not_computed": result.figures.not_computed,
        "figures": [_figure(comparison, result.figures.source) for comparison in result.comparisons],
    }


def _figure(comparison: Comparison, source: str) -> dict[str, Any]:
    figure, (nearest, gap) = comparison.figure, comparison.nearest
    return {
        "key": figure.key,
        "what": figure.what,
        "unit": figure.unit,
        "published": json_number(figure.number),
        "printed": figure.printed(),
        "source": comparison.source or source,
        "computed": {name: json_number(value) for name, value in comparison.computed.items()},
        "agrees": comparison.agrees,
        "nearest": nearest,
        "gap": gap,
        "efficiency": None if comparison.efficiency is None else json_number(comparison.efficiency),
    }


def _section(result: SetResult) -> Report:
    figures = result.figures
    title, before = _wrapped(f"{figures.name}: {figures.title}"), _wrapped(f"published in: {figures.source}")
    named = list(figures.conventions)
    side_by_side = len(named) <= MOST_COLUMNS
    rows = [row for comparison in result.comparisons for row in _rows(comparison, side_by_side)]
    values = [Column("computed", "computed"), Column("convention", "as", left=True)]
    if side_by_side:
        values = [Column(name, name) for name in named]
    columns = [Column("what", "figure", left=True), Column("published", "published"), *values]
    columns.append(Column("gap", "nearest"))
    if any(comparison.efficiency is not None for comparison in result.comparisons):
        columns.append(Column("efficiency", "effi-\nciency"))
    after = _wrapped(f"{AGREES} prints as published: {_agreement(result, side_by_side)}. {figures.why}")
    after += [line for remark in result.remarks() for line in _wrapped(remark)]
    for claim, reason in figures.not_computed.items():
        after += wrapped(f"not computed: {claim}: {reason}", "", 2)
    legend = []
    for name, meaning in figures.conventions.items():
        legend += wrapped(f"{name}: {meaning}", "  ", 4)
    return Report(SCHEMA, {}, columns, rows, title=title, before=before, legend=legend, after=after)


def _agreement(result: SetResult, by_convention: bool) -> str:
    """Return how many figures agree: under each convention, or under any of them."""
    if not by_convention:
        return f"{sum(bool(one.agrees) for one in result.comparisons)} of {len(result.comparisons)} figures"
    counts = [(name, *result.agreeing(name)) for name in result.figures.conventions]
    return ", ".join(f"{name} {agreeing} of {computed}" for name, agreeing, computed in counts)


def _wrapped(text: str) -> list[str]:
    return wrapped(text)


def _cell(figure: Figure, value: Fraction, agrees: bool) -> str:
    """Return a computed value with more digits than are published, and a mark if it prints the same."""
    whole = figure.unit != "ratio" and value.denominator == 1
    digits = 0 if whole else figure.decimals + 1 if figure.unit in ("ratio", "x") else max(2, figure.decimals)
    text = figure.show(value, digits)
    if figure.unit != "x":
        text = text.removesuffix(figure.unit).rstrip()
    return f"{text} {AGREES if agrees else ' '}"


def _gap(comparison: Comparison) -> str:
    """Return the relative deviation of the nearest value, or "" if a value agrees."""
    gap = comparison.nearest[1]
    if comparison.agrees:
        return ""
    if abs(gap) < 1e-3:
        return "under 0.1%"
    return f"{gap:+.1%}" if abs(gap) < 0.1 else f"{gap:+.0%}"


def _rows(comparison: Comparison, side_by_side: bool) -> list[dict[str, Any]]:
    """Return one row with a cell for each convention, or a row for each convention."""
    figure, agreeing, nearest = comparison.figure, comparison.agrees, comparison.nearest[0]
    cells = {name: _cell(figure, value, name in agreeing) for name, value in comparison.computed.items()}
    first = {"what": figure.what, "published": figure.printed()}
    if comparison.efficiency is not None:
        first["efficiency"] = f"{float(comparison.efficiency):.1%}"
    if side_by_side:
        return [first | cells | {"gap": "" if agreeing else f"{nearest} {_gap(comparison)}"}]
    rows = [{"convention": name, "computed": cell} for name, cell in cells.items()]
    rows[list(cells).index(nearest)]["gap"] = _gap(comparison)
    return [first | rows[0], *rows[1:]]
