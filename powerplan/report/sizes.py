"""`powerplan budget` without a model: the sizes that a budget supports, by context."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from powerplan.dtypes import Dtypes
from powerplan.report.budget import device_entry, hours_text, rate_text, size_entry
from powerplan.report.colour import side_of
from powerplan.report.parts import CONTEXT, convention_entry, show_bytes, show_ratio
from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped, plain
from powerplan.report.width import wrapped
from powerplan.search.sizing import Sized, Sizing
from powerplan.training import RULE, TOKENS_PER_PARAMETER, Throughput
from powerplan.units import format_duration, format_parameters, json_number

SCHEMA = "powerplan.sizes/1"


def sizes_report(sizing: Sizing, dtypes: Dtypes, batch_tokens: int | None, throughput: Throughput | None) -> Report:
    """Return the report of the sizes that a budget supports; throughput: of the devices that its hours run on."""
    total = sizing.total_flops
    rows = [_row(sized, batch_tokens) | {"recommended": sized.recommended} for sized in sizing.rows]
    balanced = [_row(sized, batch_tokens) for sized in sizing.balanced]
    payload: dict[str, Any] = {
        "convention": convention_entry(sizing.rows[0].budget.accounting, dtypes),
        "total_flops": json_number(total),
    }
    lines = wrapped(f"{float(total):.4g} FLOPs, spent on {TOKENS_PER_PARAMETER} tokens per active parameter: {RULE}")
    if throughput is not None:
        hours = float(total / throughput.flops_per_s) / 3600
        payload |= device_entry(throughput) | {"gpu_hours": hours, "days": hours / 24 / throughput.devices}
        count = f"{throughput.devices:,} devices" if throughput.devices > 1 else "one device"
        time = format_duration(hours * 3600 / throughput.devices)
        lines.append(f"{hours_text(hours)} device hours {rate_text(throughput)}: {time} on {count}")
    steps = []
    if batch_tokens is not None:
        payload["batch_tokens"] = batch_tokens
        lines.append(f"Optimizer steps are of {batch_tokens:,} tokens")
        steps = [Column("steps", "steps", grouped)]
    sections = []
    if balanced:
        head = wrapped("Each shape as it is, at the context that balances it (as many state as weight FLOPs):")
        columns = [_SHAPE, CONTEXT, *_SIZE, _STATE, *steps]
        sections.append(Report(SCHEMA, {}, columns, _with_size(balanced), before=head))
    columns = [_SHAPE, _LABEL, *_SIZE, _WSFR, _STATE, *steps]
    for context in dict.fromkeys(row["context"] for row in rows):
        own = [row for row in rows if row["context"] == context]
        title = f"At {context:,} tokens:"
        recommended = itemgetter("recommended")
        sections.append(Report(SCHEMA, {}, columns, _with_size(own), before=[title], strong=recommended))
    sections.insert(0, Report(SCHEMA, {}, [], [], before=[*lines, ""], legend=_legend()))
    in_csv = [Column(key, key) for key in rows[0] if key != "label"]
    return Report(SCHEMA, payload | {"balanced": balanced, "rows": rows}, in_csv, rows, sections=sections)


def _row(sized: Sized, batch_tokens: int | None) -> dict[str, Any]:
    budget, spec = sized.budget, sized.spec
    size = size_entry(budget, batch_tokens)
    del size["total_flops"]  # The same in all rows.
    return {
        "context": sized.context,
        "shape": sized.shape,
        "mixer": sized.mixer,
        "label": sized.label,
        "layers": spec.layer_count,
        "hidden_size": spec.hidden_size,
        "params_active": budget.parameters,
        **size,
    }


def _with_size(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"size": f"{row['layers']} x {row['hidden_size']:,}"} for row in rows]


_SHAPE = Column("shape", "shape of", plain, left=True)
_LABEL = Column("label", "mixers", plain, left=True, fold=" + ")
_WSFR = Column("wsfr", "WSFR", show_ratio, role=side_of)
_STATE = Column("state_bytes", "state per\nsequence", show_bytes)
_SIZE = [
    Column("size", "layers x\nwidth"),
    Column("params_active", "parameters", format_parameters),
    Column("tokens", "tokens", format_parameters),
]
"""Tokens per parameter are about the same in all rows, and stand in JSON and CSV alone."""


def _legend() -> list[str]:
    return wrapped(
        "A shape is a dense attention model of the catalogue, in other widths and depths, without learned positions. "
        "Shown are those whose own training takes FLOPs nearest to the budget. Where the state takes more FLOPs than "
        "the weights, the next line has the mixers that balance the shape, at the size that then uses up the budget: "
        "powerplan recommend says why, and what else would do."
    )
