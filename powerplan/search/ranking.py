"""The order of candidates.

Balance comes first; then power before a window at equal state (arXiv 2507.04239, sections 3.3 and 5.1), fewer kinds and
regular patterns, bytes of state, and time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil, inf, log, log2
from typing import NamedTuple

from powerplan.balance import BALANCED_WITHIN
from powerplan.choices import Keep, Side
from powerplan.dims import odd_degree
from powerplan.search.choices import Choice
from powerplan.search.trials import Search, Trial

BALANCED = log(float(BALANCED_WITHIN))
"""Distance from the target, in log units, within which a plan is balanced."""

NEAR = log(5 / 4)
"""Distance within which a model is best left as it is: at 1:1, the FLOPs lost on either side are under 12 %."""

BAND = log(2) / 2
"""Width of the bands in which plans further from the target count as equally far: half a doubling."""

_FAMILY_ORDER = {"window": 1, "linear": 2}
"""Families that rank after all others, which are 0."""


class _Traits(NamedTuple):
    """What plans are sorted by of each of their choices."""

    kernel_order: int
    family_order: int
    degree_penalty: int
    head_dim_steps: int
    degree: int | None
    fewer_kv_heads: bool


@dataclass(frozen=True)
class Ranking:
    """The order of the trials of one search.

    prefer: the side that should be the heavier one, where one must be.
    keep: "weights" puts plans last that make projections smaller; "flops" does not, since every plan is resized.
    time: training seconds per token of a trial; FLOPs per token decide where it is None.
    """

    search: Search
    prefer: Side | None = None
    keep: Keep = "weights"
    time: Callable[[Trial], float] | None = None

    def distance(self, trial: Trial) -> float:
        """Return the distance from the target in log units: the largest over the contexts.

        At a context before the longest, softmax attention itself may be lighter than the target. No mixer has more
        state to give there, so the distance is that of the FLOPs, weights and state, from those with softmax attention.
        """
        basis, cost, target = self.search.basis, trial.cost, self._target
        least, most = inf, 0.0
        for context, state, softmax in zip(basis.contexts, cost.scaled_state_flops, self._light_softmax, strict=True):
            if not state:
                return inf
            ratio = 2 * context * cost.weight_flops_per_token / state
            relative = ratio / target if softmax is None else (1 + 1 / ratio) / (1 + 1 / softmax)
            least, most = min(least, relative), max(most, relative)
        return max(abs(log(least)), abs(log(most)))

    @cached_property
    def _target(self) -> float:
        return float(self.search.target)

    @cached_property
    def _light_softmax(self) -> list[float | None]:
        """The ratio of softmax attention at each context where it is lighter than the target, else None."""
        ratios = [self.search.softmax_ratio(index) for index in range(len(self.search.basis.contexts) - 1)]
        return [ratio if ratio > self.search.target else None for ratio in ratios] + [None]

    def balanced(self, trial: Trial) -> bool:
        return self.distance(trial) <= BALANCED

    def near(self, trial: Trial) -> bool:
        """Whether the model as it is would best be left so."""
        return trial.plan.unchanged and self.distance(trial) <= NEAR

    def smaller_weights(self, trial: Trial) -> bool:
        """Whether a plan makes projections smaller, where weights should stay as they are.

        Projections that replace MLA's, as near as heads allow, count as weights that stay.
        """
        return self.keep == "weights" and any(self._traits(choice).fewer_kv_heads for choice in trial.plan.choices)

    def key(self, trial: Trial) -> tuple[object, ...]:
        """Return what candidates are sorted by; the first that differs decides."""
        plan, cost, distance = trial.plan, trial.cost, self.distance(trial)
        traits = [self._traits(choice) for choice in plan.choices]
        balanced = distance <= BALANCED or (plan.unchanged and distance <= NEAR)
        tier = 0 if balanced else 1 if distance <= NEAR else 2
        band = int((distance - NEAR) / BAND) if tier == 2 and distance < inf else tier
        steps = [trait.head_dim_steps for trait in traits]
        return (
            trial.wasteful,
            self.smaller_weights(trial),
            tier,
            band,
            self.prefer is not None and self._wrong_side(trial),
            not plan.unchanged,
            max([trait.kernel_order for trait in traits]),
            max([trait.family_order for trait in traits]),
            max([trait.degree_penalty for trait in traits]),
            max(steps) > 1,
            len(traits),
            sum(steps),
            len({trait.degree for trait in traits if trait.degree}),
            not plan.regular,
            cost.state_half_bytes,
            self.time(trial) if self.time else self.search.basis.scaled_flops(cost),
            distance,
            cost.parameters,
            plan.text(),
        )

    @cached_property
    def _traits(self) -> Callable[[Choice], _Traits]:
        return cache(self._traits_of)

    def _traits_of(self, choice: Choice) -> _Traits:
        return _Traits(
            choice.kernel_order,
            _family_order(choice),
            degree_penalty(choice),
            self._head_dim_steps(choice),
            choice.degree,
            choice.fewer_kv_heads,
        )

    def _head_dim_steps(self, choice: Choice) -> int:
        """Return how many doublings or halvings lie between the head dims of a choice and the model's own."""
        heads = choice.mixers[0].own_heads() if choice.reshaped else None
        if heads is None or self.search.own_head_dim is None:
            return 0
        return ceil(abs(log2(heads.head_dim / self.search.own_head_dim)))

    def _wrong_side(self, trial: Trial) -> bool:
        ratio = self.search.basis.wsfr(trial.cost)
        if ratio is None:
            return False
        return ratio < self.search.target if self.prefer == "weights" else ratio > self.search.target


def _family_order(choice: Choice) -> int:
    """Return the rank of what a choice puts into layers; power attention of degree 1 is linear attention."""
    return 2 if choice.degree == 1 else max((_FAMILY_ORDER.get(family, 0) for family in choice.families), default=0)


def degree_penalty(choice: Choice) -> int:
    """Rank lower (larger) what is harder to train: 2 for odd degrees, whose weights change sign; 1 above 2; else 0."""
    degree = choice.degree or 0
    return 2 if odd_degree(degree) else int(degree > 2)


def sort_of(trial: Trial) -> tuple[object, ...]:
    """Return what sort of candidate a trial is: a table shows the best of each sort."""
    plan, main = trial.plan, trial.plan.main
    if plan.unchanged:
        return ("unchanged",)
    if plan.is_mix:
        return ("mix", plan.scope.partial, *sorted(choice.family for choice in plan.choices))
    if main.degree and main.degree > 1:
        return ("power", plan.scope.partial, main.degree if main.plain else "shaped", main.fewer_kv_heads)
    return (*sorted(plan.families), plan.scope.partial)
