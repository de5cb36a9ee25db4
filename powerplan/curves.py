"""Contexts at which a curve is drawn, and how an axis names them: for figures (plots) and for the page of a report."""

from __future__ import annotations

from collections.abc import Sequence

from powerplan.units import MAX_CONTEXT


def sampled_contexts(marked: Sequence[int], steps: int = 1) -> list[int]:
    """Return `marked` and powers of two, from an eighth of the shortest, at most 1k, to 16 times the longest, in order.

    None is longer than the longest context that is accepted.

    marked: the contexts of an answer, in tokens. steps: into how many the way from one power of two to the next is cut.
    """
    low, high = min(1024, max(1, min(marked) // 8)), min(max(marked) * 16, MAX_CONTEXT)
    powers = [2**exponent for exponent in range(low.bit_length() - 1, high.bit_length())]
    between = {power + power * step // steps for power in powers[:-1] for step in range(1, steps)}
    return sorted({*powers, *between, *marked})


def short_context(tokens: int) -> str:
    """Return a context as axes show it, in binary thousands: "64k"."""
    for exponent, suffix in ((30, "G"), (20, "M"), (10, "k")):
        if tokens >= 2**exponent:
            return f"{tokens / 2**exponent:g}{suffix}"
    return str(tokens)
