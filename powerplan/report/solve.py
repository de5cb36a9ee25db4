"""`powerplan recommend --solve`: the largest context, window or degree that meets a weight-state FLOP ratio."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

from powerplan.report.colour import side_of
from powerplan.report.parts import row_entry, show_bytes, show_ratio
from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.search import Solution
from powerplan.swap import swap_text
from powerplan.units import format_ratio

SOLVE_SCHEMA = "powerplan.solve/1"


def solve_report(solution: Solution, name: str, context: int, target: Fraction) -> Report:
    """Return the report of a reverse question about a model by name; context: where windows and degrees are judged."""
    words = {"context": "context", "window": "window in every layer", "p": "degree p"}[solution.unknown]
    at, beyond = row_entry(solution.at), row_entry(solution.beyond)
    unit = "" if solution.unknown == "p" else " tokens"
    place = "" if solution.unknown == "context" else f" at {context:,} tokens"
    line = (
        f"{name}{place}: the largest {words} with {format_ratio(target)} or more weight is {solution.value:,}{unit}: "
        f"{show_ratio(solution.at.wsfr)}, state {show_bytes(solution.at.state_bytes)} per sequence"
    )
    rows = [{"value": solution.value, **at}, {"value": solution.value + 1, **beyond}]
    payload = {
        "model": name,
        "solve": solution.unknown,
        "target": float(target),
        "context": at["context"],
        "value": solution.value,
        "mixer": swap_text(solution.swap) if solution.swap else None,
        "at": at,
        "beyond": beyond,
    }
    columns = [
        Column("value", solution.unknown, grouped),
        Column("wsfr", "WSFR", show_ratio, role=partial(side_of, target=target)),
        # Rounded FLOPs of the two rows are mostly the same.
        Column("weight_flops_per_token", "weight\nFLOPs", _whole),
        Column("state_flops_per_token", "state\nFLOPs", _whole),
        Column("state_bytes", "state per\nsequence", show_bytes),
    ]
    return Report(SOLVE_SCHEMA, payload, columns, rows, title=wrapped(line))


def _whole(value: int | float) -> str:
    return f"{round(value):,}"
