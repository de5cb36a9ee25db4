"""The report of `powerplan compare`: models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powerplan.accounting import Accounting, Row
from powerplan.report.parts import (
    convention_entry,
    model_entry,
    parameters_text,
    row_entry,
    show_bytes,
    show_flops,
    show_ratio,
)
from powerplan.report.render import Column, Report, grouped

SCHEMA = "powerplan.compare/1"


def compare_report(accountings: Sequence[Accounting], rows: Sequence[Sequence[Row]], dtype: str) -> Report:
    """Return the report of several models side by side.

    Args:
        accountings: the models, all in the same convention.
        rows: for each model its numbers at each context, with weights and cache in `dtype`.
        dtype: the number format of weights and cache, as a name.
    """
    models: list[dict[str, Any]] = [
        model_entry(accounting)
        | {
            "layers": accounting.spec.layer_count,
            "hidden_size": accounting.spec.hidden_size,
            "balanced_context": accounting.balanced_context(),
            "rows": [row_entry(row) for row in rows_of_model],
        }
        for accounting, rows_of_model in zip(accountings, rows, strict=True)
    ]
    table = [
        {"name": model["name"], "params_active": model["params_active"], **row}
        for rows_of_context in zip(*(model["rows"] for model in models), strict=True)
        for model, row in zip(models, rows_of_context, strict=True)
    ]
    payload = {"convention": convention_entry(accountings[0], dtype), "models": models}
    before = []
    for accounting in accountings:
        spec, balanced = accounting.spec, accounting.balanced_context()
        before.append(
            f"{spec.name}: {parameters_text(accounting)}, {spec.layer_count} layers of {spec.hidden_size:,}; "
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
