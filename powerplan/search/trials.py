"""The search: every choice in all layers, and every pair of choices in every proportion, as sums of whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import combinations
from operator import sub
from typing import NamedTuple

from powerplan.accounting import Accounting
from powerplan.search import choices
from powerplan.search.choices import WINDOWS, Choice, Scope
from powerplan.search.costs import Cost, CostBasis, ScopeCosts
from powerplan.search.layer_plan import LayerPlan, exceptions_by_mixer
from powerplan.spec import ModelSpec
from powerplan.swap.shapes import common_shape
from powerplan.swap.windows import balanced_window

EVERY_PROPORTION = 128
"""Layers up to which a mix is tried in every proportion; deeper models are tried in 64ths."""

MOST_FLOPS_IN_A_MIX = 8
"""A layer that costs this many times the FLOPs of softmax attention has no place in a mix."""


class Trial(NamedTuple):
    """A plan, its cost, and whether one of its choices costs more than keeping every key (see `Excess`)."""

    plan: LayerPlan
    cost: Cost
    wasteful: bool


@dataclass(frozen=True)
class Excess:
    """How many times the FLOPs and bytes of softmax attention a choice takes, per layer at the longest context.

    A bounded state that takes more FLOPs than attending to every key, or more bytes than keeping them, buys nothing.
    Sparse attention keeps every key, and more, on purpose: it saves FLOPs, and its bytes do not count here.
    """

    flops: Fraction
    bytes: Fraction

    @property
    def wasteful(self) -> bool:
        return self.flops > 1 or self.bytes > 1


class Search:
    """All candidates of one model at one list of contexts, for one weight-state FLOP ratio (`target`)."""

    def __init__(
        self,
        accounting: Accounting,
        basis: CostBasis,
        target: Fraction,
        admits: Callable[[LayerPlan], bool],
        named_kinds: Iterable[str] = (),
    ) -> None:
        """Prepare the search of plans that `admits` lets pass, with those of NAMED_KINDS that `named_kinds` has."""
        self.accounting, self.basis, self.target, self.admits = accounting, basis, target, admits
        self.spec: ModelSpec = accounting.spec
        self.scopes = choices.scopes(self.spec)
        self.named_kinds = tuple(named_kinds)
        self.costs = {scope: ScopeCosts(accounting, scope, basis) for scope in self.scopes}
        self._excess: dict[Choice, Excess] = {}
        # What the layers of a scope would be if each kept every key.
        self._full = cache(lambda scope: choices.keeping_every_key(self.spec, scope.distinct))
        whole = choices.whole_scope(self.spec)
        stay = choices.staying(whole.distinct)
        wasteful = whole in self.scopes and self.excess(whole, stay).wasteful
        self.as_is = Trial(LayerPlan(whole, stay), basis.of_model(accounting), wasteful)

    @cached_property
    def own_head_dim(self) -> int | None:
        """The head dim of the layers, where they have one in common."""
        shape = common_shape(self.as_is.plan.scope.distinct, self.spec.hidden_size)
        return shape.head_dim if shape else None

    def trials(self) -> list[Trial]:
        """Return every candidate that is admitted, the model as it is first."""
        trials = [self.as_is] if self.admits(self.as_is.plan) else []
        for scope in self.scopes:
            trials.extend(self._uniform(scope))
            trials.extend(self._mixes(scope))
        return trials

    def _uniform(self, scope: Scope) -> Iterator[Trial]:
        balanced = self.balanced_window(scope)
        windows = [window for window in WINDOWS if window < self.basis.longest]
        if balanced is not None:
            windows = sorted({balanced, balanced + 1, *windows})
        named = choices.named_choices(self.spec, scope, self.named_kinds)
        for choice in (*choices.uniform_choices(self.spec, scope, windows), *named):
            plan = LayerPlan(scope, choice)
            if choice.mixers != scope.distinct and self.admits(plan):
                yield Trial(plan, self.costs[scope].uniform(choice), self.excess(scope, choice).wasteful)

    def _mixes(self, scope: Scope) -> Iterator[Trial]:
        costs, layers = self.costs[scope], scope.layers
        named = choices.named_choices(self.spec, scope, self.named_kinds)
        mixed = [
            choice
            for choice in (*choices.mix_choices(self.spec, scope, self.basis.longest), *named)
            if self.admits(LayerPlan(scope, choice, choice, 0))
            and self.excess(scope, choice).flops <= MOST_FLOPS_IN_A_MIX
        ]
        counts = _exception_counts(layers)
        splits = [self._split(scope, count) for count in counts]
        # For each choice and split: the model's cost with it in the rest of the layers, and its cost as the exceptions.
        main = {choice: [costs.layers(choice, most).plus(costs.rest) for most, _ in splits] for choice in mixed}
        other = {choice: [costs.layers(choice, few) for _, few in splits] for choice in mixed}
        for first, second in combinations(mixed, 2):
            wasteful = self.excess(scope, first).wasteful or self.excess(scope, second).wasteful
            costs_of_both = zip(counts, main[first], other[first], main[second], other[second], strict=True)
            for count, first_most, first_few, second_most, second_few in costs_of_both:
                yield Trial(LayerPlan(scope, first, second, count), first_most.plus(second_few), wasteful)
                if 2 * count < layers:
                    yield Trial(LayerPlan(scope, second, first, count), second_most.plus(first_few), wasteful)

    def _split(self, scope: Scope, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how many layers of each distinct mixer are among the rest, and among the `count` exceptions."""
        few = exceptions_by_mixer(scope, count)
        return tuple(map(sub, scope.counts, few)), few

    def split(self, plan: LayerPlan) -> list[tuple[int, ...]]:
        """Return for each choice of a plan in how many layers of each distinct mixer it stands."""
        return list(self._split(plan.scope, plan.count)) if plan.is_mix else [plan.scope.counts]

    def excess(self, scope: Scope, choice: Choice) -> Excess:
        """Return how a choice compares with softmax attention in the same layers."""
        if choice not in self._excess:
            costs, flops, sizes = self.costs[scope], [], []
            for mixer, other in dict.fromkeys(zip(choice.mixers, self._full(scope).mixers, strict=True)):
                cost, softmax = costs.of(mixer), costs.of(other)
                flops.append(Fraction(cost.scaled_state_flops[-1], softmax.scaled_state_flops[-1]))
                if softmax.state_half_bytes:  # None where a layer reads the keys of an earlier one.
                    sizes.append(Fraction(0 if mixer.sparse_reads else cost.state_half_bytes, softmax.state_half_bytes))
            self._excess[choice] = Excess(max(flops), max(sizes, default=Fraction(0)))
        return self._excess[choice]

    def softmax_ratio(self, index: int) -> float:
        """Return the ratio at one of the contexts if every layer that can be swapped kept every key; 0 if none can."""
        if not self.scopes:
            return 0.0
        scope = self.scopes[0]
        return float(self.basis.wsfr(self.costs[scope].uniform(self._full(scope)), index) or 0)

    def balanced_window(self, scope: Scope) -> int | None:
        """Return the longest window in all layers of a scope that leaves the weights `target` times the state."""
        return balanced_window(self.spec, self.basis.longest, self.basis.convention, self.target, scope.partial)


def _exception_counts(layers: int) -> list[int]:
    """Return the numbers of exceptions that are tried, up to half of the layers."""
    half = range(1, layers // 2 + 1)
    if layers <= EVERY_PROPORTION:
        return list(half)
    return sorted({round(Fraction(layers * part, 64)) for part in range(1, 33)} & set(half))
