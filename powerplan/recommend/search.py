"""The search: every choice in all layers, and every pair of choices in every proportion. Sums of whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations
from operator import add
from typing import NamedTuple

from powerplan.accounting import Accounting, last_within
from powerplan.mixers import NSA, MoBA
from powerplan.recommend.choices import (
    WINDOWS,
    Choice,
    Scope,
    asked_choices,
    choice,
    family,
    mix_choices,
    scopes,
    shape_of,
    softmax_in_place,
    staying,
    uniform_choices,
)
from powerplan.recommend.costs import FLOPS, STATE, WEIGHT, Cost, Costs, Rates
from powerplan.recommend.plan import Plan, places
from powerplan.spec import ModelSpec
from powerplan.swaps import default_shape, window_text

MAX_COUNTS = 128
"""Layers up to which a mix is tried in every proportion; beyond, in 64ths."""

TOO_MUCH = 8
"""A layer that costs this many times the FLOPs of softmax attention has no place in a mix."""


class Trial(NamedTuple):
    """A plan, its cost, and whether one of its choices costs more than keeping every key (see `Waste`)."""

    plan: Plan
    cost: Cost
    wasteful: bool


@dataclass(frozen=True)
class Waste:
    """By how many times a choice exceeds softmax attention of the same heads, per layer at the longest context.

    A bounded state that takes more FLOPs than attending to every key, or more bytes than keeping them, buys nothing.
    Sparse attention keeps every key, and more, on purpose: what it saves is FLOPs.
    """

    flops: Fraction
    bytes: Fraction

    @property
    def any(self) -> bool:
        return self.flops > 1 or self.bytes > 1


class Search:
    """All candidates of one model at one list of contexts. asked: kinds of ASKED that take part."""

    def __init__(
        self,
        accounting: Accounting,
        rates: Rates,
        target: Fraction,
        admits: Callable[[Plan], bool],
        asked: Iterable[str] = (),
    ) -> None:
        self.accounting, self.rates, self.target, self.admits = accounting, rates, target, admits
        self.spec: ModelSpec = accounting.spec
        self.scopes = scopes(self.spec)
        self.asked = tuple(asked)
        self._waste: dict[Choice, Waste] = {}
        self._costs: dict[Scope, Costs] = {}
        self.as_is = self._as_is()

    def _as_is(self) -> Trial:
        mixers = []
        for use in self.spec.layer_uses():
            if use.layer.mixer is not None:
                mixers += [(position, use.layer.mixer) for span in use.positions for position in span]
        mixers.sort(key=lambda slot: slot[0])
        scope = Scope(tuple(place for place, _ in mixers), tuple(mixer for _, mixer in mixers), False)
        item = staying(scope.classes)
        wasteful = bool(self.scopes) and self.scopes[0] == scope and self.waste(scope, item).any
        return Trial(Plan(scope, item), Costs(self.accounting, None, self.rates).rest, wasteful)

    @cached_property
    def own_head_dim(self) -> int | None:
        """The head dim of the layers, where they have one in common."""
        shape = shape_of(self.spec, self.as_is.plan.scope)
        return shape.head_dim if shape else None

    def costs(self, scope: Scope) -> Costs:
        if scope not in self._costs:
            self._costs[scope] = Costs(self.accounting, scope, self.rates)
        return self._costs[scope]

    def trials(self) -> list[Trial]:
        """Return every candidate that is admitted, the model as it is first."""
        found = [self.as_is] if self.admits(self.as_is.plan) else []
        for scope in self.scopes:
            found.extend(self._uniform(scope))
            found.extend(self._mixes(scope))
        return found

    def _uniform(self, scope: Scope) -> Iterator[Trial]:
        costs = self.costs(scope)
        exact = self.window(scope)
        windows = [window for window in WINDOWS if window < self.rates.contexts[-1]]
        if exact is not None:
            windows = sorted({exact, exact + 1, *windows})
        for item in (*uniform_choices(self.spec, scope, windows), *asked_choices(self.spec, scope, self.asked)):
            plan = Plan(scope, item)
            if item.mixers != scope.classes and self.admits(plan):
                yield Trial(plan, costs.uniform(item), self.waste(scope, item).any)

    def _mixes(self, scope: Scope) -> Iterator[Trial]:
        costs, layers = self.costs(scope), len(scope.positions)
        items = [
            item
            for item in (
                *mix_choices(self.spec, scope, self.rates.contexts[-1]),
                *asked_choices(self.spec, scope, self.asked),
            )
            if self.admits(Plan(scope, item, item, 0)) and self.waste(scope, item).flops <= TOO_MUCH
        ]
        splits = [(count, *self._split(scope, count)) for count in _counts(layers)]
        parts = {
            item: [(costs.layers(item, main), costs.layers(item, other)) for _, main, other in splits] for item in items
        }
        for first, second in combinations(items, 2):
            wasteful = self.waste(scope, first).any or self.waste(scope, second).any
            for (count, _, _), (main, few), (most, other) in zip(splits, parts[first], parts[second], strict=True):
                if 2 * count <= layers:
                    cost = tuple(map(add, map(add, costs.rest, main), other))
                    yield Trial(Plan(scope, first, second, count), cost, wasteful)
                if 2 * count < layers:
                    cost = tuple(map(add, map(add, costs.rest, few), most))
                    yield Trial(Plan(scope, second, first, count), cost, wasteful)

    def _split(self, scope: Scope, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how many layers of each class are among the rest, and among the `count` exceptions."""
        few = [scope.mixers[index] for index in places(len(scope.positions), count)]
        other = tuple(few.count(mixer) for mixer in scope.classes)
        return tuple(map(int.__sub__, self.costs(scope).counts, other)), other

    def split(self, plan: Plan) -> list[tuple[int, ...]]:
        """Return for each choice of a plan in how many layers of each class it stands."""
        if not plan.is_mix:
            return [tuple(plan.scope.mixers.count(mixer) for mixer in plan.scope.classes)]
        return list(self._split(plan.scope, plan.count))

    def waste(self, scope: Scope, item: Choice) -> Waste:
        """Return how a choice compares with softmax attention in the same layers."""
        if item not in self._waste:
            costs = self.costs(scope)
            full = softmax_in_place(self.spec, scope.classes)
            pairs = [(costs.of(mixer), costs.of(other)) for mixer, other in zip(item.mixers, full, strict=True)]
            self._waste[item] = Waste(
                max(Fraction(own[-1], softmax[-1]) for own, softmax in pairs),
                max(
                    Fraction(0) if isinstance(mixer, (NSA, MoBA)) else Fraction(own[STATE], softmax[STATE])
                    for mixer, (own, softmax) in zip(item.mixers, pairs, strict=True)
                ),
            )
        return self._waste[item]

    def softmax_ratio(self, index: int) -> float:
        """Return the ratio at one of the contexts if every layer that can be swapped kept every key; 0 if none can."""
        if not self.scopes:
            return 0.0
        scope = self.scopes[0]
        full = softmax_in_place(self.spec, scope.classes)
        ratio = self.wsfr(self.costs(scope).uniform(Choice("", full, "")), index)
        return float(ratio) if ratio is not None else 0.0

    def window(self, scope: Scope) -> int | None:
        """Return the longest window in all layers of a scope that leaves the weights `target` times the state."""
        costs, named, longest = self.costs(scope), default_shape(self.spec), self.rates.contexts[-1]

        def light(window: int) -> bool:
            cost = costs.uniform(choice(self.spec, window_text(window, named), scope.classes))
            return 2 * longest * cost[WEIGHT] >= self.target * cost[-1]

        return last_within(light, longest) if longest > 1 else None

    def wsfr(self, cost: Cost, index: int = -1) -> Fraction | None:
        """Return the weight-state FLOP ratio of a cost at one of the contexts; None without state."""
        context = self.rates.contexts[index]
        state = cost[FLOPS:][index]
        return Fraction(2 * context * cost[WEIGHT], state) if state else None


def _counts(layers: int) -> list[int]:
    """Return the numbers of exceptions that are tried, up to half of the layers."""
    half = layers // 2
    if layers <= MAX_COUNTS:
        return list(range(1, half + 1))
    return sorted({round(Fraction(layers * part, 64)) for part in range(1, 33)})


def families(plan: Plan) -> set[str]:
    """Return the words of KINDS that a plan's mixers go by."""
    return {family(mixer) for item in plan.choices for mixer in item.mixers}
