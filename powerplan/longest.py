"""The largest number at which a count is at most a limit, and the first that meets a condition: exact, by halving."""

from __future__ import annotations

from collections.abc import Callable

from powerplan.mixers.formulas import Rational


def last_at_most(limit: Rational, value: Callable[[int], Rational], highest: int) -> int | None:
    """Return the largest number below `highest` whose `value`, which never falls, is at most `limit`.

    The result is None where the value is more at 1 already, or still at most `limit` at `highest`. Steps to where a
    straight line meets the limit take turns with halvings: FLOPs that grow in proportion to the context, at least
    from where windows are full, need about ten values and not fifty. No function needs more than a hundred.
    """
    low, high = 1, highest
    at_low, at_high = value(low), value(high)
    if at_low > limit or at_high <= limit:
        return None
    halving = False
    while high - low > 1:
        middle = (low + high) // 2
        if not halving:
            line = low + int((high - low) * (limit - at_low) / (at_high - at_low))
            middle = min(max(line, low + 1), high - 1)
        at_middle = value(middle)
        if at_middle <= limit:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
        halving = not halving
    return low


def first_that(holds: Callable[[int], bool]) -> int:
    """Return the smallest number from 1 on for which a condition holds, as it does for all that are larger.

    Powers of two are tried up to the first for which it holds, then the middle of what is left.
    """
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def last_at_most_in_periods(
    limit: Rational, least: Callable[[int, int], Rational], period: int, highest: int
) -> int | None:
    """Return the largest number below `highest` whose value is at most `limit`, where values fall now and then.

    The result is None where no value is, or that of `highest` is still.

    least: of (first, last), a number that no value from first to last is below, and the value itself where these are
    equal. It never falls where both grow by a period, nor where the range becomes smaller.
    period: numbers that are a period apart have values that never fall. So periods with a value of at most the limit
    come before all others: they are halved. Within one, parts whose `least` is above the limit are left out: of a few
    that come close to it, most are, so that a search takes some hundred values.
    """
    if least(highest, highest) <= limit:
        return None

    def last_within(number: int) -> int | None:
        """Return the largest number of a period, these counted from 0, whose value is at most the limit."""
        parts = [(number * period + 1, min((number + 1) * period, highest))]
        while parts:
            first, last = parts.pop()
            if least(first, last) > limit:
                continue
            if first == last:
                return first
            middle = (first + last) // 2
            parts += [(first, middle), (middle + 1, last)]
        return None

    found, light, heavy = None, -1, -(-highest // period)
    while heavy - light > 1:
        middle = (light + heavy) // 2
        within = last_within(middle)
        if within is None:
            heavy = middle
        else:
            found, light = within, middle
    return found
