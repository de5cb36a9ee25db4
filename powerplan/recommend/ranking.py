"""The order of candidates, and why each stands where it does.

Balance first; then power over window at equal state (arXiv 2507.04239, sections 3.3 and 5.1), fewer kinds and regular
patterns, state bytes, and time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, inf, log, log2
from typing import Literal

from powerplan.mixers import GroupedHeads
from powerplan.recommend.choices import Choice
from powerplan.recommend.costs import FLOPS, PARAMETERS, STATE, WEIGHT
from powerplan.recommend.search import Search, Trial, families

BALANCED = log(20 / 19)
"""Distance from the target, in log units, within which a plan is balanced: 5 %, as in the verdict of wsfr."""

NEAR = log(5 / 4)
"""Distance within which a model is best left as it is: at 1:1, the FLOPs lost on either side are under 12 %."""

BAND = log(2) / 2
"""Width of the bands in which plans further from the target count as equally far: half a doubling."""

Side = Literal["weights", "state"]
Keep = Literal["weights", "flops"]

_ORDER = {"power": 0, "attention": 0, "mla": 0, "window": 1, "linear": 2}


@dataclass(frozen=True)
class Ranking:
    """Order of the trials of one search.

    prefer: the side that should be the heavier one, where one must be. keep: "weights" puts plans last that make
    projections smaller; "flops" does not mind, since every plan is rescaled. time: seconds per token, FLOPs if None.
    """

    search: Search
    prefer: Side | None = None
    keep: Keep = "weights"
    time: Callable[[Trial], float] | None = None

    def distance(self, trial: Trial) -> float:
        """Return the distance from the target in log units: the largest over the contexts.

        At contexts before the longest where softmax attention itself is lighter than the target, nothing has more state
        to give: there the distance is that of the FLOPs, weights and state, from those with softmax attention.
        """
        rates, cost = self.search.rates, trial.cost
        worst = 0.0
        for context, state, light in zip(rates.contexts, cost[FLOPS:], self._lighter, strict=True):
            if not state:
                return inf
            ratio = 2 * context * cost[WEIGHT] / state
            aim = float(self.search.target) if light is None else light
            worst = max(worst, abs(log(ratio / aim if light is None else (1 + 1 / ratio) / (1 + 1 / aim))))
        return worst

    @cached_property
    def _lighter(self) -> list[float | None]:
        """The ratio of softmax attention at each context where it stands for the target, else None."""
        last = len(self.search.rates.contexts) - 1
        ratios = [self.search.softmax_ratio(index) for index in range(last)]
        return [ratio if ratio > self.search.target else None for ratio in ratios] + [None]

    def balanced(self, trial: Trial) -> bool:
        return self.distance(trial) <= BALANCED

    def tier(self, trial: Trial, distance: float) -> int:
        """0 balanced, or near enough to leave the model as it is; 1 near; 2 beyond."""
        if distance <= BALANCED or (trial.plan.unchanged and distance <= NEAR):
            return 0
        return 1 if distance <= NEAR else 2

    def weights_kept(self, trial: Trial) -> bool:
        """Whether the projections stay what they are; MLA's successors, as near as heads allow, count as that."""
        return self.keep == "flops" or not any(item.fewer for item in trial.plan.choices)

    def key(self, trial: Trial) -> tuple[object, ...]:
        """Return what candidates are sorted by; the first that differs decides."""
        plan, cost = trial.plan, trial.cost
        distance = self.distance(trial)
        tier = self.tier(trial, distance)
        kinds = families(plan) | {"linear" for item in plan.choices if item.degree == 1}
        steps = [self._steps(item) for item in plan.choices]
        return (
            trial.wasteful,
            not self.weights_kept(trial),
            tier,
            int((distance - NEAR) / BAND) if tier == 2 and distance < inf else tier,
            self._wrong_side(trial),
            not plan.unchanged,
            not all(item.runs for item in plan.choices),
            max((_ORDER.get(kind, 0) for kind in kinds), default=0),
            max(_degree(item) for item in plan.choices),
            max(steps) > 1,
            len(plan.choices),
            sum(steps),
            len({item.degree for item in plan.choices if item.degree}),
            not plan.regular,
            cost[STATE],
            self.time(trial) if self.time else cost[WEIGHT] + Fraction(cost[-1], 2 * self.search.rates.contexts[-1]),
            distance,
            cost[PARAMETERS],
            plan.text(),
        )

    def _steps(self, item: Choice) -> int:
        """Return how many doublings or halvings lie between the head dims of a choice and the model's own."""
        if not item.reshaped or not isinstance(item.mixers[0], GroupedHeads) or self.search.own_head_dim is None:
            return 0
        return ceil(abs(log2(item.mixers[0].head_dim / self.search.own_head_dim)))

    def _wrong_side(self, trial: Trial) -> bool:
        ratio = self.search.wsfr(trial.cost)
        if self.prefer is None or ratio is None:
            return False
        return ratio < self.search.target if self.prefer == "weights" else ratio > self.search.target


def _degree(item: Choice) -> int:
    """Return 2 for odd degrees (weights of both signs), 1 for even ones above 2, 0 for the rest."""
    if item.odd:
        return 2
    return int(item.family == "power" and (item.degree or 0) > 2)


def group(trial: Trial) -> tuple[object, ...]:
    """Return what a candidate is an example of: a table shows the best of each."""
    plan = trial.plan
    kinds = tuple(sorted(families(plan)))
    if plan.unchanged:
        return ("as it is",)
    item = plan.main
    if plan.is_mix:
        return ("mix", plan.scope.partial, *sorted(choice.family for choice in plan.choices))
    if item.degree and item.degree > 1:
        own = not item.reshaped and not item.fewer and ("normalize=false" not in item.text)
        return ("power", plan.scope.partial, item.degree if own else "shaped", item.fewer)
    return (*kinds, plan.scope.partial)
