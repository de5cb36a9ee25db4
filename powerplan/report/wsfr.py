"""`powerplan wsfr`: the ratio per context, what it means, and what it is made of."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from enum import StrEnum
from fractions import Fraction
from typing import Any

from powerplan.accounting import Accounting, Component, Row, explain, positions_text
from powerplan.mixers.base import SYMBOLS
from powerplan.report.render import Column, Report, grouped
from powerplan.units import format_bytes, format_count, format_parameters, format_ratio, json_number

SCHEMA = "powerplan.wsfr/1"


class By(StrEnum):
    component = "component"
    layer = "layer"


def wsfr_report(accounting: Accounting, contexts: Sequence[int], dtype: str, by: By | None, explained: bool) -> Report:
    """Return the report of a model at `contexts`, with cache and weights in `dtype`."""
    rows = [accounting.row(context, dtype) for context in contexts]
    payload: dict[str, Any] = {
        "model": model_of(accounting),
        "convention": convention_of(accounting, dtype),
        "balanced_context": accounting.balanced_context(),
        "rows": [row_of(row) | {"verdict": verdict(accounting, row)} for row in rows],
    }
    after = [verdict(accounting, rows[-1])]
    columns: list[Column] = _COLUMNS
    table = payload["rows"]
    if by is not None:
        table = []
        for row, entry in zip(rows, payload["rows"], strict=True):
            parts = accounting.components(row.context) if by is By.component else accounting.layers(row.context)
            entry[f"by_{by}"] = [_part(part, row) for part in parts]
            table.extend({"context": row.context, **part} for part in entry[f"by_{by}"])
        columns = _PARTS if by is By.component else [_PARTS[0], _LAYERS, *_PARTS[1:]]
    if explained:
        lines, entries = _explanation(accounting, contexts[-1])
        payload["explain"] = entries
        after = [*lines, "", *after]
    before = _title(accounting)
    if by is None:
        before.append(
            f"decode: bytes moved for the last token at batch 1, LM head included; weights and cache in {dtype}"
        )
    return Report(SCHEMA, payload, columns, table, before=before, after=after)


def verdict(accounting: Accounting, row: Row) -> str:
    """Return one line that says what the ratio at `row` means."""
    if row.wsfr is None:
        return "no state: every FLOP is between activations and weights"
    place = f"at {row.context:,} tokens"
    if Fraction(19, 20) <= row.wsfr <= Fraction(20, 19):
        return f"balanced: {format_ratio(row.wsfr)} weight to state FLOPs {place}"
    if row.wsfr > 1:
        text = f"weight-heavy: {_times(row.wsfr)}x more weight than state FLOPs {place}"
    else:
        text = f"state-heavy: {_times(1 / row.wsfr)}x more state than weight FLOPs {place}"
    return f"{text}; {_balance(accounting, row)}"


def _times(ratio: Fraction) -> str:
    return f"{float(ratio):.1f}" if ratio < 100 else f"{round(ratio):,}"


def _balance(accounting: Accounting, row: Row) -> str:
    balanced = accounting.balanced_context()
    if balanced is not None:
        return f"balanced at {balanced:,}"
    if not accounting.grows_with_context:
        if accounting.convention.form == "chunked":
            return "where it balances is not computed for --form chunked"
        return "where it balances is not computed: its state FLOPs per token do not always grow with the context"
    if row.wsfr is not None and row.wsfr > 1:
        return "its state stays lighter than its weights at any context"
    return "its state is heavier than its weights at any context"


def model_of(accounting: Accounting) -> dict[str, Any]:
    """Return what JSON says of a model: its name and parameters."""
    total, active = accounting.total_parameters, accounting.active_parameters
    return {
        "name": accounting.spec.name,
        "params_total": total.with_embeddings,
        "params_active": active.with_embeddings,
        "position_embeddings": accounting.spec.position_embeddings,
        "params_by_convention": {
            name: {"total": getattr(total, name), "active": getattr(active, name)}
            for name in ("with_embeddings", "without_input_embedding", "without_embeddings")
        },
    }


def convention_of(accounting: Accounting, dtype: str) -> dict[str, Any]:
    """Return what JSON says of the convention that its numbers follow."""
    convention = accounting.convention
    return {
        "causal": convention.causal,
        "lm_head": convention.lm_head,
        "form": convention.form,
        "dtype": dtype,
        "recurrent_state_dtype": "fp32",
    }


def _title(accounting: Accounting) -> list[str]:
    total = accounting.total_parameters.with_embeddings
    active = accounting.active_parameters.with_embeddings
    size = f"{format_parameters(total)} parameters" + (
        f", {format_parameters(active)} active" if active != total else ""
    )
    convention, positions = accounting.convention, accounting.spec.position_embeddings
    head = "LM head counted" if convention.lm_head else "LM head not counted"
    return [
        f"{accounting.spec.name}: {size}",
        f"forward FLOPs per token, mean over the sequence: {convention.form} form, causal {convention.causal}, {head}",
        *([f"learned positions end at {positions:,}: longer contexts are what-ifs"] if positions else []),
    ]


def row_of(row: Row) -> dict[str, Any]:
    """Return what JSON says at one context: raw numbers."""
    return {
        "context": row.context,
        "weight_flops_per_token": row.weight_flops,
        "state_flops_per_token": json_number(row.state_flops),
        "wsfr": float(row.wsfr) if row.wsfr is not None else None,
        "state_elements": row.state_elements,
        "state_bytes": json_number(row.state_bytes),
        "decode_weight_bytes_per_token": json_number(row.decode_weight_bytes),
        "decode_state_bytes_per_token": json_number(row.decode_state_bytes),
    }


def _part(part: Component, row: Row) -> dict[str, Any]:
    flops = part.weight_flops + part.state_flops
    entry: dict[str, Any] = {
        "name": part.name,
        "weight_flops_per_token": part.weight_flops,
        "state_flops_per_token": json_number(part.state_flops),
        "share": float(flops / (row.weight_flops + row.state_flops)),
    }
    if part.use is not None:
        entry["layers"] = positions_text(part.use.positions)
        entry["layer_count"] = part.use.count
    return entry


def show_ratio(value: float | None) -> str:
    """Show a weight-state FLOP ratio of a row."""
    return "no state" if value is None else format_ratio(Fraction(value))


def show_flops(value: int | float) -> str:
    """Show FLOPs, a dash for none."""
    return format_count(Fraction(value)) if value else "-"


def show_bytes(value: int | float) -> str:
    """Show bytes of a row."""
    return format_bytes(Fraction(value))


_COLUMNS = [
    Column("context", "context", grouped),
    Column("weight_flops_per_token", "weight\nFLOPs", show_flops),
    Column("state_flops_per_token", "state\nFLOPs", show_flops),
    Column("wsfr", "WSFR", show_ratio),
    Column("state_bytes", "state per\nsequence", show_bytes),
    Column("decode_weight_bytes_per_token", "decode:\nweights", show_bytes),
    Column("decode_state_bytes_per_token", "decode:\nstate", show_bytes),
]

_PARTS = [
    Column("context", "context", grouped),
    Column("name", "part", left=True),
    Column("weight_flops_per_token", "weight\nFLOPs", show_flops),
    Column("state_flops_per_token", "state\nFLOPs", show_flops),
    Column("share", "share", lambda value: f"{value:.1%}"),
]
_LAYERS = Column("layers", "layers", left=True)


def _explanation(accounting: Accounting, context: int) -> tuple[list[str], list[dict[str, Any]]]:
    lines = [f"How the numbers at {context:,} tokens come about"]
    entries: list[dict[str, Any]] = []
    used: set[str] = set()
    scope = source = ""
    for item in explain(accounting.spec, context, accounting.convention):
        used.update(name for name, _ in _used(item.term.formula, item.term.symbols))
        if item.scope != scope:
            scope = item.scope
            lines.extend(("", scope))
        if item.source and item.source != source:
            source = item.source
            lines.append(f"  source: {source}")
        factor = f"{item.factor}·" if item.factor != 1 else ""
        formula = item.term.formula.replace("*", "·")
        numbers = item.term.substituted()
        if factor:
            formula, numbers = f"{factor}({formula})", f"{factor}({numbers})"
        per_model = f", times {item.count} layers = {_exact(item.value * item.count)}" if item.count > 1 else ""
        lines.append(f"  {item.quantity}, {item.term.component}")
        lines.append(f"    {formula} = {numbers} = {_exact(item.value)}{per_model}")
        entries.append(
            {
                "scope": item.scope,
                "quantity": item.quantity,
                "component": item.term.component,
                "formula": f"{item.factor}*({item.term.formula})" if factor else item.term.formula,
                "values": {name: json_number(value) for name, value in _used(item.term.formula, item.term.symbols)},
                "value": json_number(item.value),
                "layers": item.count,
                "source": item.source or None,
            }
        )
    letters = "; ".join(f"{letter} = {meaning}" for letter, meaning in SYMBOLS.items() if letter in used)
    lines[1:1] = textwrap.wrap(letters, width=118, initial_indent="  ", subsequent_indent="  ")
    return lines, entries


def _used(formula: str, symbols: Any) -> list[tuple[str, Any]]:
    names = set(re.findall(r"[A-Za-z_]+", formula))
    return [(name, value) for name, value in symbols.items() if name in names]


def _exact(value: int | Fraction) -> str:
    number = json_number(value)
    return f"{number:,}" if isinstance(number, int) else f"{number:,.3f}"
