"""Where the recommended plan is off the target: which plan comes closest to it, and which one meets it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from powerplan.search.limits import Demand
from powerplan.search.ranking import Ranking
from powerplan.search.trials import Trial


@dataclass(frozen=True)
class Miss:
    """What there is besides a first plan that is off the target.

    closest: of the plans within the limits that leave the weights as they are, the one nearest to the target; None
        where that is the first plan, or where such a plan meets the target.
    meets: the first plan that is on target: within the limits, or else the one that is over them by the least.
    limits: those, one demand of each, that plans of the weights as they are do not meet where they are on target.
    wasteful: whether plans are on target only by states that are dearer than keeping every key.
    """

    closest: Trial | None
    meets: Trial | None
    limits: tuple[Demand, ...]
    wasteful: bool


def miss_of(ordered: Sequence[Trial], ranking: Ranking, unmet: Callable[[Trial], Sequence[Demand]]) -> Miss | None:
    """Return what there is besides the first of `ordered` plans; None where it is on target.

    ordered: plans from first to last. Those that are dearer than keeping every key buy nothing, and count only where
    the first one is such a plan. unmet: the limits that a plan does not meet.
    """
    first = ordered[0]
    if ranking.balanced(first):
        return None
    on_target = list(filter(ranking.balanced, ordered))
    sound = [trial for trial in on_target if trial.wasteful <= first.wasteful]
    allowed = next((trial for trial in sound if not unmet(trial)), None)
    over = min(sound, key=lambda trial: (ranking.smaller_weights(trial), _worst(unmet(trial))), default=None)
    alike = [trial for trial in sound if not ranking.smaller_weights(trial)]
    met_by_same_weights = allowed is not None and not ranking.smaller_weights(allowed)
    return Miss(
        closest=None if met_by_same_weights else _closest(ordered, ranking, unmet),
        meets=allowed or over,
        limits=() if met_by_same_weights else _limits(map(unmet, alike)),
        wasteful=bool(on_target) and not sound,
    )


def _limits(unmet: Iterable[Sequence[Demand]]) -> tuple[Demand, ...]:
    """Return one demand of each option that is among the unmet ones of some plans."""
    return tuple({demand.option: demand for demands in unmet for demand in demands}.values())


def _worst(demands: Sequence[Demand]) -> Fraction:
    """Return how many times what is allowed is needed, of the limit that is furthest away."""
    return max((demand.excess for demand in demands), default=Fraction(0))


def _closest(ordered: Sequence[Trial], ranking: Ranking, unmet: Callable[[Trial], Sequence[Demand]]) -> Trial | None:
    """Return the plan within the limits, of the weights as they are, that is closer to the target than the first."""
    first = ordered[0]
    nearest, least = None, ranking.distance(first)
    for trial in ordered:
        if trial.wasteful > first.wasteful or ranking.smaller_weights(trial):
            continue
        distance = ranking.distance(trial)
        if distance < least and not unmet(trial):
            nearest, least = trial, distance
    return nearest
