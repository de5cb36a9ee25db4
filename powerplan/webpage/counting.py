"""How the numbers of a page were counted: the convention in words, and every formula with the numbers put in."""

from __future__ import annotations

import re
from dataclasses import dataclass

from powerplan.explanation import explain
from powerplan.mixers.formulas import SYMBOLS, Convention
from powerplan.report.parts import dtypes_text
from powerplan.units import json_number
from powerplan.webpage.asked import Asked


@dataclass(frozen=True)
class Formula:
    """A formula, the same with the numbers put in, and its value; and what it gives for how many layers."""

    quantity: str
    component: str
    formula: str
    numbers: str
    value: str
    layers: int


@dataclass(frozen=True)
class Scope:
    """The formulas of one kind of layer, or of the whole model. sources: where they were published."""

    name: str
    sources: tuple[str, ...]
    formulas: tuple[Formula, ...]


def convention_words(asked: Asked) -> list[str]:
    """Return the convention in sentences."""
    convention = asked.wsfr.accounting.convention
    return [
        "FLOPs are those of matrix products, 2 for a multiplication and an addition, of the forward pass, per token, "
        f"averaged over a sequence of {asked.context:,} tokens from an empty state.",
        _form(convention),
        "Training takes three times the forward FLOPs.",
        f"Bytes: {dtypes_text([asked.wsfr.model], asked.wsfr.dtypes)}; recurrent state in {asked.wsfr.dtypes.state}.",
        "WSFR is weight FLOPs over state FLOPs. Balanced means within 5% of 1:1.",
    ]


def _form(convention: Convention) -> str:
    head = "counted" if convention.lm_head else "not counted"
    causal = "the keys that a causal mask leaves" if convention.causal == "exact" else "every key for every query"
    form = "in proportion to the state" if convention.form == "recurrent" else "as a chunked kernel executes them"
    return f"State FLOPs are counted {form} ({convention.form} form), with {causal}; the LM head is {head}."


def scopes(asked: Asked) -> list[Scope]:
    """Return every formula with the numbers put in, by kind of layer, as `powerplan wsfr --explain` prints them."""
    found: dict[str, list[Formula]] = {}
    sources: dict[str, list[str]] = {}
    for line in explain(asked.wsfr.model, asked.context, asked.wsfr.accounting.convention):
        formula, numbers = line.term.formula.replace("*", "·"), line.term.substituted()
        if line.factor != 1:
            formula, numbers = f"{line.factor}·({formula})", f"{line.factor}·({numbers})"
        value = json_number(line.value)
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
        own = Formula(line.quantity, line.term.component, formula, numbers, text, line.count)
        found.setdefault(line.scope, []).append(own)
        if line.source and line.source not in sources.setdefault(line.scope, []):
            sources[line.scope].append(line.source)
    return [Scope(name, tuple(sources.get(name, ())), tuple(formulas)) for name, formulas in found.items()]


def letters(found: list[Scope]) -> list[tuple[str, str]]:
    """Return the letters of the formulas and what they stand for."""
    used = {letter for scope in found for own in scope.formulas for letter in re.findall(r"[A-Za-z_]+", own.formula)}
    return [(letter, meaning) for letter, meaning in SYMBOLS.items() if letter in used]
