"""The report of `powerplan compare`: models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powerplan.accounting import Accounting, Row
from powerplan.dtypes import Dtypes
from powerplan.report.parts import (
    CONTEXT,
    RATIOS,
    balance_text,
    convention_entry,
    model_entry,
    moved_text,
    parameters_text,
    row_entry,
)
from powerplan.report.render import Report
from powerplan.report.tables import Column
from powerplan.report.width import wrapped


def compare_report(accountings: Sequence[Accounting], rows: Sequence[Sequence[Row]], dtypes: Dtypes) -> Report:
    """Return the report of models in the same convention; rows: for each model its numbers at each context."""
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
    payload = {"convention": convention_entry(accountings[0], dtypes), "models": models}
    before = []
    for accounting in accountings:
        spec = accounting.spec
        size = f"{parameters_text(accounting)}, {spec.layer_count} layers of {spec.hidden_size:,}"
        before.append(f"{spec.name}: {size}; {balance_text(accounting)}")
    formats = moved_text([accounting.spec for accounting in accountings], dtypes)
    legend = wrapped(f"FLOPs forward, per token; decode: bytes for one token at batch 1; {formats}.")
    columns = [CONTEXT, Column("name", "model", left=True), *RATIOS]
    return Report("powerplan.compare/1", payload, columns, table, before=before, legend=legend)
