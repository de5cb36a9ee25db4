"""Every formula that the counts of a model come from, with its numbers put in: what `--explain` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from powerplan.accounting import positions_text
from powerplan.ffn import FFN, multiplied_terms
from powerplan.mixers.base import Mixer
from powerplan.mixers.formulas import Convention, Rational, Term
from powerplan.spec import ModelSpec


@dataclass(frozen=True)
class Explained:
    """One formula of an explanation, and the layers that have it.

    scope: the layers, in words; count: how many. quantity: what the formula gives, with its unit. factor: what the term
    is multiplied with, 2 FLOPs for each parameter. source: where the formula was published.
    """

    scope: str
    quantity: str
    term: Term
    count: int
    factor: int
    source: str

    @property
    def value(self) -> Rational:
        return self.factor * self.term.value


def explain(spec: ModelSpec, context: int, convention: Convention) -> list[Explained]:
    """Return every formula with the numbers put in: parameters, weight FLOPs, state and state FLOPs, by layer kind."""
    lines: list[Explained] = []

    def add(scope: str, quantity: str, factor: int, terms: Sequence[Term], count: int = 1, source: str = "") -> None:
        lines.extend(Explained(scope, quantity, term, count, factor, source) for term in terms)

    weights, parameters, hidden = "weight FLOPs per token", "parameters outside matmuls", spec.hidden_size
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
                add(scope, "state elements", 1, block.state_terms(context), use.count, block.source)
                flops = block.state_flops_terms(context, convention)
                add(scope, "state FLOPs per token", 1, flops, use.count, block.source)
        if not use.layer.tied:
            add(scope, parameters, 1, spec.norm_terms(use.layer), use.count)
    for extra in spec.extras:
        add("model", weights, 2, extra.matmul_terms(hidden), source=extra.source)
        add("model", parameters, 1, extra.other_terms(hidden), source=extra.source)
    for terms in (spec.embedding_terms(), spec.position_terms(), spec.embedding_norm_terms(), spec.final_norm_terms()):
        add("model", parameters, 1, terms)
    if convention.lm_head:
        add("model", weights, 2, spec.head_terms())
    return lines
