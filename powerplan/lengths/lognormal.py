"""Documents whose lengths are lognormal, as a histogram that needs no random numbers.

The lengths of web pages and of code are close to lognormal over their bulk. A length is the number of tokens that a
value of the continuous distribution begins: ceil(x), where x is lognormal and at most `longest`. So n tokens or fewer
have the probability Phi((ln n - mu) / sigma) / Phi((ln longest - mu) / sigma).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from powerplan.errors import InputError

DOCUMENTS = 10**6
"""Documents of a histogram that stands for a distribution: a length that one in a million has is still there."""

STEPS = 64
"""Lengths of an octave that are told apart, of those above STEPS tokens: neighbours differ by 1.1 %."""

LONGEST = 2**20
"""Tokens of the longest document, where none is given."""

MIN_SIGMA, MAX_SIGMA = 0.01, 5.0
"""The range of sigma: at 5, the middle 68 % of lengths span a factor of 22,000."""


def lognormal_counts(mu: float, sigma: float, longest: int) -> dict[int, int]:
    """Return how many of DOCUMENTS documents have each length.

    Lengths up to STEPS tokens stand for themselves. Longer ones stand in steps of 1/STEPS of an octave, each step for
    the mean of the lengths in it, rounded: the tokens are those of the distribution, to the rounding. The documents up
    to the end of a step are DOCUMENTS times its probability, rounded.
    """
    counts: dict[int, int] = {}
    low, before = 0, 0
    for high in _edges(longest):
        upto = round(DOCUMENTS * _below(high, mu, sigma, longest))
        if upto > before:
            length = high if high == low + 1 else _step_mean(low, high, mu, sigma)
            counts[length] = counts.get(length, 0) + upto - before
        low, before = high, upto
    return counts


def solved(known: dict[str, float], longest: int, where: str) -> tuple[float, float]:
    """Return mu and sigma for two of the mean, the median and the 99th percentile in tokens, and sigma.

    All of them are those of the documents: of at least 1 token and at most `longest`.

    Raises:
        InputError: no lognormal distribution has them. The message begins with `where`.
    """
    for name in ("mean", "median", "p99"):
        if known.get(name, 0) >= longest:
            problem = f"{name} {known[name]:,.0f} is not below the longest document, {longest:,} tokens (max)"
            raise InputError(problem, where)
    if "sigma" in known:
        sigma = known["sigma"]
        name = next(name for name in known if name != "sigma")
        return _mu_of(name, known[name], sigma, longest), sigma
    placed = "p99" if "p99" in known else "median"
    wanted = "mean" if "mean" in known else "median"
    larger, smaller = (placed, wanted) if placed == "p99" else (wanted, placed)
    if known[larger] <= known[smaller]:
        raise InputError(f"the {larger} must be more than the {smaller}, and they are {_pair(known)}", where)

    def found(sigma: float) -> float:
        return _value(wanted, _mu_of(placed, known[placed], sigma, longest), sigma, longest)

    # A broader distribution has a smaller mean below the same p99, and a larger one above the same median: up to where
    # its longest documents reach the longest of all. The narrowest that fits is taken.
    falls = placed == "p99"
    grid = [MIN_SIGMA, *(step / 20 for step in range(1, round(20 * MAX_SIGMA) + 1))]
    target = known[wanted]
    before = grid[0]
    for sigma in grid:
        if (found(sigma) <= target) == falls:
            sigma = _bisected(lambda value: (found(value) <= target) == falls, before, sigma)
            return _mu_of(placed, known[placed], sigma, longest), sigma
        before = sigma
    nearest = (min if falls else max)(found(sigma) for sigma in grid)
    which, number = "smallest" if falls else "largest", f"{nearest:,.{0 if nearest >= 100 else 2}f}"
    raise InputError(
        f"no lognormal of at most {longest:,} tokens has {_pair(known)}; the {which} {wanted} is {number}", where
    )


def _pair(known: dict[str, float]) -> str:
    return " and ".join(f"{name} {value:,.0f}" for name, value in known.items())


def _edges(longest: int) -> list[int]:
    """Return the last lengths of the steps, up to the longest: all whole numbers first, then 1/STEPS of an octave."""
    edges = list(range(1, min(STEPS, longest) + 1))
    step = 1
    while edges[-1] < longest:
        octave, part = divmod(step, STEPS)
        edge = round(STEPS * 2**octave * 2 ** (part / STEPS))
        edges += [min(edge, longest)] if edge > edges[-1] else []
        step += 1
    return edges


def _phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _below(length: float, mu: float, sigma: float, longest: int) -> float:
    """Return the probability of so many tokens or fewer."""
    whole = _phi((math.log(longest) - mu) / sigma)
    return _phi((math.log(length) - mu) / sigma) / whole if whole else float(length >= longest)


def _mass(low: float, high: float, mu: float, sigma: float) -> tuple[float, float]:
    """Return the probability between two values, and the integral of x there, of the whole lognormal distribution."""

    def between(shift: float) -> float:
        ends = [(math.log(value) - mu) / sigma - shift if value else -math.inf for value in (low, high)]
        if ends[0] > 0:  # The difference of two small numbers, and not of two numbers near 1.
            return _phi(-ends[0]) - _phi(-ends[1])
        return _phi(ends[1]) - _phi(ends[0])

    return between(0.0), math.exp(mu + sigma * sigma / 2) * between(sigma)


def _mean(low: float, high: float, mu: float, sigma: float) -> float:
    """Return the mean of the lengths whose x is between two values; half a token is what ceil adds."""
    mass, integral = _mass(low, high, mu, sigma)
    mean = integral / mass if mass > 1e-290 else high
    return min(max(mean, low), high) + 0.5


def _step_mean(low: int, high: int, mu: float, sigma: float) -> int:
    return min(max(round(_mean(low, high, mu, sigma)), low + 1), high)


def _value(name: str, mu: float, sigma: float, longest: int) -> float:
    """Return the mean or the median of a distribution."""
    if name == "mean":
        return _mean(0, longest, mu, sigma)
    return math.exp(_bisected(lambda x: _below(math.exp(x), mu, sigma, longest) >= 0.5, -700.0, math.log(longest)))


def _mu_of(name: str, value: float, sigma: float, longest: int) -> float:
    """Return the mu with which the mean, the median or the 99th percentile has this value."""
    middle, reach = math.log(value), 40 * sigma + sigma * sigma + 5
    if name == "mean":
        return _bisected(lambda mu: _mean(0, longest, mu, sigma) >= value, middle - reach, middle + reach)
    share = 0.99 if name == "p99" else 0.5
    return _bisected(lambda mu: _below(value, mu, sigma, longest) <= share, middle - reach, middle + reach)


def _bisected(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition begins to hold between a value where it does not and one where it does."""
    for _ in range(64):
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
