"""From which context one mixer is faster than another: bisection, with a measurement at each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp, log, sqrt

from powerplan.measured import Direction
from powerplan.profile.result import Crossover, CrossoverTiming

Pair = tuple[float, float]
"""Seconds of the one mixer and of the other at a context."""

CLOSE_ENOUGH = 1.15
"""Bisection ends once the contexts on either side have this ratio: on a busy machine noise is not much smaller."""

SHORTEST = 64
"""Shortest context that is tried, in tokens."""

LONGEST = 2**22
"""Longest context that is tried, in tokens."""

MULTIPLE = 16
"""Contexts that are tried are multiples of it."""


def find_crossover(
    known: Mapping[int, Pair], measure: Callable[[int], Pair | None], *, name: str, against: str, direction: Direction
) -> Crossover | None:
    """Return the context from which `name` is faster than `against`, one at most; None where nothing is known.
    `measure` returns None where time or memory does not suffice, which ends the search."""
    times = dict(known)
    if not times:
        return None
    while (context := _next_context(times)) is not None and (pair := measure(context)) is not None:
        times[context] = pair
    slower_at, faster_at = _bracket(times)
    return Crossover(
        name=name,
        against=against,
        direction=direction,
        context=_interpolated(times, slower_at, faster_at) if slower_at and faster_at else None,
        slower_at=slower_at,
        faster_at=faster_at,
        estimate=_extrapolated(times) if faster_at is None else None,
        tried=tuple(CrossoverTiming(at, own * 1000, other * 1000) for at, (own, other) in sorted(times.items())),
    )


def _next_context(times: Mapping[int, Pair]) -> int | None:
    """Return the context to try next; None where the answer is near enough, or out of range."""
    slower_at, faster_at = _bracket(times)
    if slower_at and faster_at:
        if faster_at / slower_at <= CLOSE_ENOUGH:
            return None
        wanted = sqrt(slower_at * faster_at)
    elif faster_at is not None:
        wanted = faster_at / 2
    else:
        assert slower_at is not None
        wanted = min(_extrapolated(times) * CLOSE_ENOUGH, 8 * slower_at, LONGEST)
    context = max(MULTIPLE, round(wanted / MULTIPLE) * MULTIPLE)
    return None if context in times or not SHORTEST <= context <= LONGEST else context


def _bracket(times: Mapping[int, Pair]) -> tuple[int | None, int | None]:
    """Return the longest context where the one mixer is slower, and the shortest beyond it where it is faster."""
    slower_at = max((context for context, (own, other) in times.items() if own > other), default=None)
    return slower_at, min((context for context in times if slower_at is None or context > slower_at), default=None)


def _log_ratio(times: Mapping[int, Pair], context: int) -> float:
    own, other = times[context]
    return log(own / other)


def _interpolated(times: Mapping[int, Pair], low: int, high: int) -> int:
    """Return where the line through the logarithms of the two time ratios is 0."""
    first, last = _log_ratio(times, low), _log_ratio(times, high)
    share = first / (first - last) if first > last else 0.5
    return round(exp(log(low) + share * (log(high) - log(low))))


def _extrapolated(times: Mapping[int, Pair]) -> int:
    """Return where the line through the log ratios at the two longest contexts is 0."""
    # Softmax attention costs T per token and power attention a constant, so the slope is -1 at long contexts and nearer
    # to 0 at short ones. The measured slope is kept between -1.5 and -0.5, since noise can make it flat.
    *before, last = sorted(times)[-2:]
    ratio, slope = _log_ratio(times, last), -1.0
    if before:
        slope = (ratio - _log_ratio(times, before[0])) / log(last / before[0])
    return round(min(LONGEST, last * exp(ratio / -min(max(slope, -1.5), -0.5))))
