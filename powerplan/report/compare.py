"""`powerplan compare`: models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powerplan.accounting import Accounting
from powerplan.report.render import Column, Report, grouped
from powerplan.report.wsfr import convention_of, model_of, row_of, show_bytes, show_flops, show_ratio
from powerplan.units import format_parameters

SCHEMA = "powerplan.compare/1"


def compare_report(accountings: Sequence[Accounting], contexts: Sequence[int], dtype: str) -> Report:
    """Return the report of several models at the same contexts: one row for each context and model."""
    models: list[dict[str, Any]] = [
        model_of(accounting)
        | {
            "layers": accounting.spec.layer_count,
            "hidden_size": accounting.spec.hidden_size,
            "balanced_context": accounting.balanced_context(),
            "rows": [row_of(accounting.row(context, dtype)) for context in contexts],
        }
        for accounting in accountings
    ]
    table = [
        {"name": model["name"], "params_active": model["params_active"], **row}
        for rows in zip(*(model["rows"] for model in models), strict=True)
        for model, row in zip(models, rows, strict=True)
    ]
    payload = {"convention": convention_of(accountings[0], dtype), "models": models}
    before = []
    for model in models:
        total, active = model["params_total"], model["params_active"]
        balanced = model["balanced_context"]
        before.append(
            f"{model['name']}: {format_parameters(total)} parameters"
            + (f", {format_parameters(active)} active" if active != total else "")
            + f", {model['layers']} layers of {model['hidden_size']:,}; "
            + (f"balanced at {balanced:,} tokens" if balanced else "balanced at no context")
        )
    after = [f"FLOPs forward, per token; decode: bytes for one token at batch 1; weights and cache in {dtype}."]
    return Report(SCHEMA, payload, _COLUMNS, table, before=before, after=after)


_COLUMNS = [
    Column("context", "context", grouped),
    Column("name", "model", left=True),
    Column("weight_flops_per_token", "weight\nFLOPs", show_flops),
    Column("state_flops_per_token", "state\nFLOPs", show_flops),
    Column("wsfr", "WSFR", show_ratio),
    Column("state_bytes", "state per\nsequence", show_bytes),
    Column("decode_weight_bytes_per_token", "decode:\nweights", show_bytes),
    Column("decode_state_bytes_per_token", "decode:\nstate", show_bytes),
]
