"""What "balanced" means: one definition for the verdicts of reports and for the ranking of candidates."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

BALANCED_WITHIN = Fraction(20, 19)
"""A model is balanced while neither side exceeds the target by more than this factor: 5 % of the heavier side."""


@dataclass(frozen=True)
class Verdict:
    """Which side of a weight-state FLOP ratio is heavier than its target asks.

    side: "balanced", or the side that is too heavy, "weight" or "state". times: by what factor that side exceeds the
    target; at least 1, for a balanced model too.
    """

    side: Literal["balanced", "weight", "state"]
    times: Fraction


def is_balanced(ratio: Fraction, target: Fraction | int = 1) -> bool:
    """Return whether a weight-state FLOP ratio is within 5 % of its target (BALANCED_WITHIN), on either side."""
    return _excess(ratio, target) <= BALANCED_WITHIN


def verdict_of(ratio: Fraction, target: Fraction | int = 1) -> Verdict:
    """Return which side of a weight-state FLOP ratio, which must be above 0, is heavier than `target` asks.

    Args:
        ratio: weight FLOPs per token divided by state FLOPs per token, above 0.
        target: the ratio that is wanted, above 0; 1 means as many weight as state FLOPs.

    Example:
        >>> verdict_of(Fraction(1, 5))
        Verdict(side='state', times=Fraction(5, 1))
    """
    if is_balanced(ratio, target):
        return Verdict("balanced", _excess(ratio, target))
    return Verdict("weight" if ratio > target else "state", _excess(ratio, target))


def _excess(ratio: Fraction, target: Fraction | int) -> Fraction:
    relative = Fraction(ratio) / target
    return max(relative, 1 / relative)
