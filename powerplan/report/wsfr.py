"""The report of `powerplan wsfr`: the ratio at each context, what it means, and what it is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from powerplan.accounting import Accounting, Component, Row, positions_text
from powerplan.balance import verdict_of
from powerplan.choices import By
from powerplan.dtypes import Dtypes
from powerplan.errors import listed
from powerplan.explanation import ELEMENTS, STATE, WEIGHTS, Derived, Explained
from powerplan.explanation import explain as explained_terms
from powerplan.mixers.formulas import SYMBOLS
from powerplan.report.parts import (
    CONTEXT,
    FLOPS,
    RATIOS,
    context_remark,
    convention_entry,
    model_entry,
    moved_text,
    parameters_text,
    row_entry,
)
from powerplan.report.render import Report
from powerplan.report.tables import Column
from powerplan.report.width import wrapped
from powerplan.units import format_ratio, json_number

NO_STATE = "no state: every FLOP is between activations and weights"


def wsfr_report(accounting: Accounting, rows: Sequence[Row], dtypes: Dtypes, by: By | None, explain: bool) -> Report:
    """Return the report of a model's weight-state FLOP ratios.

    rows: the numbers at each context. by: the parts that every context is split into; the contexts themselves where
    None. explain: whether every formula of the last context is printed, with the numbers put in.
    """
    payload: dict[str, Any] = {
        "model": model_entry(accounting),
        "convention": convention_entry(accounting, dtypes),
        "balanced_context": accounting.balanced_context(),
        "rows": [row_entry(row) | {"verdict": verdict_text(accounting, row)} for row in rows],
        "verdict": verdict_of_all(accounting, rows),
    }
    after: list[str] = []
    columns, table = [CONTEXT, *RATIOS], payload["rows"]
    if by is not None:
        table = []
        for row, entry in zip(rows, payload["rows"], strict=True):
            parts = accounting.components(row.context) if by == "component" else accounting.layers(row.context)
            entry[f"by_{by}"] = [_part(part, row) for part in parts]
            table.extend({"context": row.context, **part} for part in entry[f"by_{by}"])
        layers = [Column("layers", "layers", left=True)] if by == "layer" else []
        share = Column("share", "share", lambda value: f"{value:.1%}")
        columns = [CONTEXT, *layers, Column("name", "part", left=True), *FLOPS, share]
    if explain:
        after, payload["explain"] = _explanation(accounting, rows[-1].context)
    legend = convention_lines(accounting, max(row.context for row in rows))
    if by is None:
        formats = moved_text([accounting.spec], dtypes)
        legend += wrapped(f"decode: bytes moved for the last token at batch 1, LM head included; {formats}")
    return Report(
        "powerplan.wsfr/1",
        payload,
        columns,
        table,
        title=[f"{accounting.spec.name}: {parameters_text(accounting)}"],
        legend=legend,
        after=after,
        verdict=[payload["verdict"]] if len(rows) == 1 else wrapped(payload["verdict"]),
    )


def verdict_of_all(accounting: Accounting, rows: Sequence[Row]) -> str:
    """Return one sentence on several contexts: each is judged by itself, and of a side the worst says by how much."""
    ratios = sorted((row.context, row.wsfr) for row in rows if row.wsfr is not None)
    if len(rows) == 1 or len(ratios) < len(rows):
        return verdict_text(accounting, rows[-1])
    return f"{sides_text(ratios)}; {_balance(accounting, rows[-1])}"


def sides_text(ratios: Sequence[tuple[int, Fraction]]) -> str:
    """Return at which contexts which side is too heavy, and by how much."""
    sides: dict[str, list[tuple[int, Fraction]]] = {}
    for context, ratio in ratios:
        verdict = verdict_of(ratio)
        sides.setdefault(verdict.side, []).append((context, verdict.times))
    parts: list[str] = []
    for side, own in sides.items():
        contexts = listed([f"{context:,}" for context, _ in own], "and")
        unit = "" if parts else " tokens"
        if side == "balanced":
            parts.append(f"balanced at {contexts}{unit}")
            continue
        lighter = "state" if side == "weight" else "weight"
        most = _times(max(times for _, times in own))
        upto = "up to " if len(own) > 1 else ""
        parts.append(f"{side}-heavy at {contexts}{unit} ({upto}{most}x as many {side} as {lighter} FLOPs)")
    return ", ".join(parts)


def verdict_text(accounting: Accounting, row: Row) -> str:
    """Return one sentence that says which side is too heavy at a row's context, and where the model balances."""
    if row.wsfr is None:
        return NO_STATE
    verdict, place = verdict_of(row.wsfr), f"at {row.context:,} tokens"
    if verdict.side == "balanced":
        return f"balanced: {format_ratio(row.wsfr)} weight to state FLOPs {place}"
    lighter = "state" if verdict.side == "weight" else "weight"
    text = f"{verdict.side}-heavy: {_times(verdict.times)}x as many {verdict.side} as {lighter} FLOPs {place}"
    return f"{text}; {_balance(accounting, row)}"


def _times(factor: Fraction) -> str:
    return f"{float(factor):.1f}" if factor < 100 else f"{round(factor):,}"


def _balance(accounting: Accounting, row: Row) -> str:
    balanced = accounting.balanced_context()
    if balanced is not None:
        return f"balanced at {balanced:,}"
    if not accounting.longest_is_found:
        if accounting.convention.form == "chunked":
            return "where it balances is not computed for --form chunked"
        return "where it balances is not computed: its state FLOPs per token do not always grow with the context"
    if row.wsfr is not None and row.wsfr > 1:
        return "its state stays lighter than its weights at any context"
    return "its state is heavier than its weights at any context"


def convention_lines(accounting: Accounting, longest: int) -> list[str]:
    """Return lines on what is counted, and remarks on contexts of up to `longest` tokens."""
    convention, positions = accounting.convention, accounting.spec.position_embeddings
    head = "LM head counted" if convention.lm_head else "LM head not counted"
    return [
        f"forward FLOPs per token, mean over the sequence: {convention.form} form, causal {convention.causal}, {head}",
        *([f"learned positions end at {positions:,}: longer contexts are what-ifs"] if positions else []),
        *wrapped(context_remark(accounting.spec, longest) or ""),
    ]


def _part(part: Component, row: Row) -> dict[str, Any]:
    flops = part.weight_flops_per_token + part.state_flops_per_token
    entry: dict[str, Any] = {
        "name": part.name,
        "weight_flops_per_token": part.weight_flops_per_token,
        "state_flops_per_token": json_number(part.state_flops_per_token),
        "share": float(flops / row.flops_per_token),
    }
    if part.use is not None:
        entry["layers"] = positions_text(part.use.positions)
        entry["layer_count"] = part.use.count
    return entry


def _explanation(accounting: Accounting, context: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Return every formula with the numbers put in, as lines of text and as entries of the JSON."""
    lines = [f"How the numbers at {context:,} tokens come about"]
    entries: list[dict[str, Any]] = []
    used: set[str] = set()
    told: set[tuple[str, Derived]] = set()
    scope = source = ""
    explained = explained_terms(accounting.spec, context, accounting.convention)
    for line in explained:
        term = line.term
        letters = set(re.findall(r"[A-Za-z_]+", term.formula))
        values = {letter: json_number(value) for letter, value in term.symbols.items() if letter in letters}
        used.update(values)
        if line.scope != scope:
            scope = line.scope
            lines.extend(("", scope))
        if line.source and line.source != source:
            source = line.source
            lines.append(f"  source: {source}")
        formula, numbers = term.formula, term.substituted()
        if line.factor != 1:
            formula, numbers = f"{line.factor}*({formula})", f"{line.factor}·({numbers})"
        per_model = f", times {line.count} layers = {_exact(line.value * line.count)}" if line.count > 1 else ""
        lines.append(f"  {line.quantity}, {term.component}")
        steps = dict.fromkeys((formula.replace("*", "·"), numbers, _exact(line.value)))  # "m = 768", and not twice.
        lines.append(f"    {' = '.join(steps)}{per_model}")
        for own in line.derived:
            used.update(letter for letter in re.findall(r"[a-z]+", own.formula) if letter in LETTERS)
            if (scope, own) not in told:
                told.add((scope, own))
                lines.append(f"    with {own.letter} = {own.formula} = {own.numbers}")
        entry = {
            "scope": line.scope,
            "quantity": line.quantity,
            "component": term.component,
            "formula": formula,
            "values": values,
            "value": json_number(line.value),
            "layers": line.count,
            "source": line.source or None,
            "derived": {own.letter: own.formula for own in line.derived},
        }
        entries.append(entry)
    meanings = "; ".join(f"{letter} = {meaning}" for letter, meaning in LETTERS.items() if letter in used)
    lines[1:1] = wrapped(meanings, "  ")
    return [*lines, *_sums(explained, accounting.row(context))], entries


LETTERS = SYMBOLS | {"w": "window", "p": "degree", "b": "features of a tile"}
"""Letters of formulas, and of what their values are derived from."""


def _sums(explained: Sequence[Explained], row: Row) -> list[str]:
    """Return the sums over all layers, from which the ratio comes."""
    lines = ["", f"All of the model at {row.context:,} tokens"]
    for quantity, whole in (
        (ELEMENTS, row.state_elements),
        (WEIGHTS, row.weight_flops_per_token),
        (STATE, row.state_flops_per_token),
    ):
        parts = [_exact(line.value * line.count) for line in explained if line.quantity == quantity and line.value]
        total = [_exact(whole)] if len(parts) != 1 else []
        words = f"{quantity} of a sequence" if quantity == ELEMENTS else quantity
        lines += [f"  {words}", f"    {' = '.join([' + '.join(parts), *total] if parts else ['0'])}"]
    if row.wsfr is not None:
        ratio = f"{_exact(row.weight_flops_per_token)} / {_exact(row.state_flops_per_token)}"
        lines += ["  WSFR, weight over state FLOPs", f"    {ratio} = {float(row.wsfr):.4g} = {format_ratio(row.wsfr)}"]
    return lines


def _exact(value: int | Fraction) -> str:
    number = json_number(value)
    return f"{number:,}" if isinstance(number, int) else f"{number:,.3f}"
