"""Every formula that the counts of a model come from, with its numbers put in: what `--explain` prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from powerplan.accounting import positions_text
from powerplan.ffn import FFN, multiplied_terms
from powerplan.mixers.base import Mixer
from powerplan.mixers.formulas import Convention, Rational, Term, exact_text, mean_keys
from powerplan.mixers.linear import RecurrentState
from powerplan.mixers.power import Power
from powerplan.spec import ModelSpec

WEIGHTS = "weight FLOPs per token"
STATE = "state FLOPs per token"
ELEMENTS = "state elements"


@dataclass(frozen=True)
class Derived:
    """Where the value of a letter comes from: a formula in letters of docs/accounting.md, and the numbers put in."""

    letter: str
    formula: str
    numbers: str


@dataclass(frozen=True)
class Explained:
    """One formula of an explanation, and the layers that have it.

    scope: the layers, in words; count: how many. quantity: what the formula gives, with its unit. factor: what the term
    is multiplied with, 2 FLOPs for each parameter. source: where the formula was published. derived: letters of the
    formula whose values are no field of the spec, as far as one formula gives them.
    """

    scope: str
    quantity: str
    term: Term
    count: int
    factor: int
    source: str
    derived: tuple[Derived, ...] = ()

    @property
    def value(self) -> Rational:
        return self.factor * self.term.value


def explain(spec: ModelSpec, context: int, convention: Convention) -> list[Explained]:
    """Return every formula with the numbers put in: parameters, weight FLOPs, state and state FLOPs, by layer kind."""
    lines: list[Explained] = []

    def add(scope: str, quantity: str, factor: int, terms: Sequence[Term], count: int = 1, source: str = "") -> None:
        lines.extend(Explained(scope, quantity, term, count, factor, source) for term in terms)

    weights, parameters, hidden = WEIGHTS, "parameters outside matmuls", spec.hidden_size
    for use in spec.layer_uses():
        scope = f"{positions_text(use.positions)}: {use.layer.describe()}"
        for block in use.layer.blocks:
            add(scope, weights, 2, multiplied_terms(block, hidden), use.count, block.source)
            if not use.layer.tied:
                add(scope, parameters, 1, block.other_terms(hidden), use.count, block.source)
                add(scope, "parameters not touched", 1, block.idle_terms(hidden), use.count, block.source)
                if isinstance(block, FFN):
                    add(scope, "of all these on the host", 1, block.host_terms(hidden), use.count, block.source)
            if isinstance(block, Mixer):
                terms = [(ELEMENTS, term) for term in block.state_terms(context)]
                terms += [(STATE, term) for term in block.state_flops_terms(context, convention)]
                for quantity, term in terms:
                    derived = _derived(block, term, context, convention)
                    lines.append(Explained(scope, quantity, term, use.count, 1, block.source, derived))
        if not use.layer.tied:
            add(scope, parameters, 1, spec.norm_terms(use.layer), use.count)
    for extra in spec.extras:
        add("model", weights, 2, extra.matmul_terms(hidden), source=extra.source)
        add("model", parameters, 1, extra.other_terms(hidden), source=extra.source)
    outside = (spec.embedding_terms(), spec.position_terms(), spec.embedding_norm_terms(), spec.final_norm_terms())
    add("model", parameters, 1, [term for part in outside for term in part])
    if convention.lm_head:
        add("model", weights, 2, spec.head_terms())
    return lines


def _derived(mixer: Mixer, term: Term, context: int, convention: Convention) -> tuple[Derived, ...]:
    """Return where a term's mean keys, its share of late tokens and its dimension of phi come from, if it has them."""
    letters, found = set(re.findall(r"[A-Za-z_]+", term.formula)), []
    window = getattr(mixer, "window", None)
    chunk = mixer.effective_chunk_size() if isinstance(mixer, RecurrentState) else context
    if "keys" in letters and term.symbols["keys"] == mean_keys(context, convention.causal, window):
        found.append(_keys(context, convention, window))
    elif "keys" in letters and term.symbols["keys"] == Fraction(chunk + 1, 2):
        found.append(Derived("keys", "(chunk + 1)/2", f"({chunk:,} + 1)/2 = {exact_text(Fraction(chunk + 1, 2))}"))
    if "late" in letters and 0 < term.symbols["late"] == Fraction(context - chunk, context):
        text = exact_text(Fraction(context - chunk, context))
        found.append(Derived("late", "(t - chunk)/t", f"({context:,} - {chunk:,})/{context:,} = {text}"))
    if "D" in letters and isinstance(mixer, Power):
        found.append(_features(mixer, chunked=term.symbols["D"] != mixer.feature_dim))
    return tuple(found)


def _keys(context: int, convention: Convention, window: int | None) -> Derived:
    """Return the mean number of keys that a query meets: `mean_keys` as text."""
    t, w = f"{context:,}", f"{window or context:,}"
    within = window is not None and window < context
    if convention.causal == "full":
        return Derived("keys", "w" if within else "t", w if within else t)
    if not within:
        return Derived("keys", "(t + 1)/2", f"({t} + 1)/2 = {exact_text(Fraction(context + 1, 2))}")
    formula = "w·(w + 1)/(2·t) + (t - w)·w/t"
    value = mean_keys(context, convention.causal, window)
    text = exact_text(value)
    about = f"about {float(value):,.3f}" if text.startswith("(") else text
    return Derived("keys", formula, f"{w}·({w} + 1)/(2·{t}) + ({t} - {w})·{w}/{t} = {about}")


def _features(mixer: Power, chunked: bool) -> Derived:
    """Return the dimension of phi: C(k + p - 1, p), or that of the tiled embedding."""
    k, p = mixer.head_dim, mixer.p
    if not chunked:
        return Derived("D", "C(k + p - 1, p)", f"C({k + p - 1:,}, {p}) = {mixer.feature_dim:,}")
    b = min(mixer.tile, k)
    tiles = -(-k // b)
    formula, numbers = "C(ceil(k/b) + p - 1, p)·b^p", f"C({tiles + p - 1:,}, {p})·{b}^{p}"
    return Derived("D", formula, f"{numbers} = {mixer.executed_dim:,}")
