"""What "balanced" means: one definition for the verdicts of reports and for the ranking of candidates."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

BALANCED_WITHIN = Fraction(20, 19)
"""A model is balanced while neither side exceeds the target by more than this factor: 5 % of the heavier side."""


@dataclass(frozen=True)
class Verdict:
    """Which side of a weight-state FLOP ratio is too heavy for its target.

    times: by what factor the heavier side exceeds the target; at least 1, for a balanced model too.
    """

    side: Literal["balanced", "weight", "state"]
    times: Fraction


def verdict_of(ratio: Fraction, target: Fraction | int = 1) -> Verdict:
    """Return which side of a weight-state FLOP ratio is too heavy for `target`, the ratio that is wanted; both above 0.

    Examples:
        >>> verdict_of(Fraction(1, 5))
        Verdict(side='state', times=Fraction(5, 1))
    """
    relative = Fraction(ratio) / target
    times = max(relative, 1 / relative)
    if times <= BALANCED_WITHIN:
        return Verdict("balanced", times)
    return Verdict("weight" if relative > 1 else "state", times)
