"""What a choice costs per layer, in whole numbers, so that a plan is a sum: no model is built for a candidate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from operator import add

from powerplan.accounting import DTYPE_BYTES, Accounting
from powerplan.mixers import Convention, Mixer
from powerplan.mixers.base import total
from powerplan.recommend.choices import Choice, Scope

HALF = 2
"""Bytes are counted in halves: int4 has half a byte per element."""

Cost = tuple[int, ...]
"""(weight FLOPs, parameters, state elements, half state bytes, half decode bytes, 2t state FLOPs at each context t)."""

WEIGHT, PARAMETERS, ELEMENTS, STATE, DECODE, FLOPS = range(6)
"""Places in a Cost; the state FLOPs of the last context, the longest, are at -1."""


@dataclass(frozen=True)
class Rates:
    """Under what costs are counted: contexts (rising), convention, dtype of weights and cache."""

    contexts: tuple[int, ...]
    convention: Convention
    dtype: str

    def of_mixer(self, mixer: Mixer, hidden: int) -> Cost:
        """Return the cost of one layer's mixer."""
        longest, width = self.contexts[-1], DTYPE_BYTES[self.dtype]
        matmul = int(total(mixer.matmul_terms(hidden)))
        stored = matmul + int(total(mixer.other_terms(hidden))) + int(total(mixer.idle_terms(hidden)))
        return (
            2 * matmul,
            stored,
            mixer.state_size(longest).elements,
            _whole(HALF * mixer.state_bytes(longest, width)),
            _whole(HALF * mixer.decode_bytes(longest, width)),
            *(_whole(2 * t * total(mixer.state_flops_terms(t, self.convention))) for t in self.contexts),
        )


def _whole(value: int | Fraction) -> int:
    exact = Fraction(value)
    assert exact.denominator == 1, f"{value} is not whole"
    return exact.numerator


class Costs:
    """The costs of plans over one scope of a model."""

    def __init__(self, accounting: Accounting, scope: Scope | None, rates: Rates) -> None:
        self.rates = rates
        self.hidden = accounting.spec.hidden_size
        self._known: dict[Mixer, Cost] = {}
        classes = scope.classes if scope else ()
        self.counts = tuple(scope.mixers.count(mixer) for mixer in classes) if scope else ()
        own = plus(times(self.of(mixer), count) for mixer, count in zip(classes, self.counts, strict=True))
        self.rest: Cost = self._model(accounting)
        if own:
            self.rest = tuple(whole - part for whole, part in zip(self.rest, own, strict=True))

    def _model(self, accounting: Accounting) -> Cost:
        """Return the cost of the whole model as it is, the decoding of its weights included."""
        rows = [accounting.row(context, self.rates.dtype) for context in self.rates.contexts]
        last = rows[-1]
        return (
            last.weight_flops,
            accounting.total_parameters.with_embeddings,
            last.state_elements,
            _whole(HALF * last.state_bytes),
            _whole(HALF * last.decode_state_bytes),
            *(_whole(2 * row.context * row.state_flops) for row in rows),
        )

    def of(self, mixer: Mixer) -> Cost:
        """Return the cost of a mixer in one layer."""
        if mixer not in self._known:
            self._known[mixer] = self.rates.of_mixer(mixer, self.hidden)
        return self._known[mixer]

    def uniform(self, choice: Choice) -> Cost:
        """Return the cost of the model with `choice` in every layer of the scope."""
        return tuple(map(add, self.rest, self.layers(choice, self.counts)))

    def layers(self, choice: Choice, counts: tuple[int, ...]) -> Cost:
        """Return the cost of `choice` in as many layers of each class as `counts` says."""
        return plus(times(self.of(mixer), count) for mixer, count in zip(choice.mixers, counts, strict=True))


def times(cost: Cost, count: int) -> Cost:
    return tuple(value * count for value in cost)


def plus(costs: Iterable[Cost]) -> Cost:
    """Return the sum, () of nothing."""
    found: Cost = ()
    for cost in costs:
        found = tuple(map(add, found, cost)) if found else cost
    return found
