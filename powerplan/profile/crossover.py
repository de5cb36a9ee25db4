"""Where one mixer overtakes another: bisection over the context, a measurement at each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp, log, sqrt

from powerplan.profile.result import Crossover, Tried

Pair = tuple[float, float]
"""Seconds of the one and of the other at a context."""

CLOSE = 1.15
"""Ratio of the contexts on either side at which bisection ends: noise on a busy machine is not much smaller."""

LOWEST, HIGHEST = 64, 2**22
STEP = 16
"""Contexts tried are multiples of it."""


def find_crossover(
    known: Mapping[int, Pair], measure: Callable[[int], Pair | None], *, name: str, against: str, direction: str
) -> Crossover | None:
    """Return where `name` overtakes `against`, from times that are known and times that `measure` adds.

    `measure` gives None where a context cannot be measured (time, memory), which ends the search. It is taken for
    granted that there is one crossing. None where nothing is known.
    """
    points = dict(known)
    if not points:
        return None

    def tried() -> tuple[Tried, ...]:
        return tuple(Tried(at, own * 1000, other * 1000) for at, (own, other) in sorted(points.items()))

    def answer(low: int | None, high: int | None, context: int | None = None, estimate: int | None = None) -> Crossover:
        return Crossover(
            name=name,
            against=against,
            direction=direction,
            context=context,
            slower_at=low,
            faster_at=high,
            estimate=estimate,
            tried=tried(),
        )

    while True:
        low, high = _bracket(points)
        if low is not None and high is not None:
            if high / low <= CLOSE:
                break
            at = _rounded(sqrt(low * high))
        elif high is not None:
            at = _rounded(high / 2)
        else:
            assert low is not None
            at = _rounded(min(_crossing(points) * CLOSE, 8 * low, HIGHEST))
        if at in points or not LOWEST <= at <= HIGHEST:
            break
        found = measure(at)
        if found is None:
            break
        points[at] = found
    low, high = _bracket(points)
    if low is not None and high is not None:
        return answer(low, high, _between(points, low, high))
    return answer(low, high, estimate=_crossing(points) if high is None else None)


def _bracket(points: Mapping[int, Pair]) -> tuple[int | None, int | None]:
    """Return the longest context with the one slower, and the shortest beyond it with the one faster."""
    slower = [at for at, (own, other) in points.items() if own > other]
    low = max(slower, default=None)
    faster = [at for at in points if low is None or at > low]
    return low, min(faster, default=None)


def _between(points: Mapping[int, Pair], low: int, high: int) -> int:
    """Return where the line between the logarithms of the two ratios is 0."""
    first, last = (log(points[at][0] / points[at][1]) for at in (low, high))
    share = first / (first - last) if first > last else 0.5
    return round(exp(log(low) + share * (log(high) - log(low))))


def _crossing(points: Mapping[int, Pair]) -> int:
    """Return where the line through the two longest contexts comes to 1, with a slope of softmax against linear cost.

    That slope is -1 at long contexts and nearer to 0 at short ones; one that noise has made flat counts as -1/2.
    """
    *before, last = sorted(points)[-2:]
    ratio = log(points[last][0] / points[last][1])
    slope = -1.0
    if before:
        slope = (ratio - log(points[before[0]][0] / points[before[0]][1])) / log(last / before[0])
    return round(min(HIGHEST, last * exp(ratio / -min(max(slope, -1.5), -0.5))))


def _rounded(context: float) -> int:
    return max(STEP, round(context / STEP) * STEP)
