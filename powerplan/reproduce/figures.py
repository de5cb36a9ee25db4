"""Published figures as data, read from powerplan/published.yaml: what a paper prints, in which unit, and where."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import floor
from typing import Literal

import msgspec

from powerplan.part import Part
from powerplan.typed import packaged_rows
from powerplan.units import parse_ratio

Unit = Literal["", "ratio", "%", "x", "B", "GB", "GiB", "TFLOP/s", "days", "Mh", "s"]

CLOSE = ("", "x", "B")
"""Units that stand right behind their number; a space stands before all others."""


class Figure(Part, frozen=True, kw_only=True):
    """One published figure; the fields from `quantity` on say what to compute for it.

    value: the number with all printed digits, or a ratio of weight to state such as "1:8".
    source: where the figure is published, if not in the source of its set.
    run: the published training run that it belongs to, a row of training_runs.yaml.
    """

    key: str
    what: str
    value: int | float | str
    unit: Unit = ""
    source: str | None = None
    quantity: str = ""
    model: str = ""
    mixer: str = ""
    context: int = 0
    p: int = 0
    head_dim: int = 0
    run: str = ""

    @property
    def number(self) -> Fraction:
        """The published value in its unit; a ratio is weight over state."""
        return parse_ratio(self.value) if isinstance(self.value, str) else Fraction(str(self.value))

    @property
    def decimals(self) -> int:
        """How many digits are printed behind the decimal point."""
        return len(str(self.value).partition(".")[2])

    def printed(self) -> str:
        """Return the figure as the paper prints it, with its unit."""
        return self.value if isinstance(self.value, str) else self.show(self.number)

    def show(self, value: Fraction, digits: int | None = None) -> str:
        """Return a value in the unit of this figure, with `digits` behind the point (None: as many as are printed)."""
        places = self.decimals if digits is None else digits
        if self.unit == "ratio":
            side = f"{_rounded(max(value, 1 / value), places):,.{places}f}"
            return f"{side}:1" if value >= 1 or side == "1" else f"1:{side}"
        gap = "" if self.unit in CLOSE else " "
        return f"{_rounded(value, places):,.{places}f}{gap}{self.unit}"

    def agrees(self, value: Fraction) -> bool:
        """Whether `value` prints the same as the published figure, rounded to as many digits."""
        return self.show(value) == self.show(self.number)

    def cut(self, value: Fraction) -> Fraction:
        """Return `value` cut off, not rounded, behind the last digit that is printed."""
        return Fraction(floor(value * 10**self.decimals), 10**self.decimals)


def _rounded(value: Fraction, places: int) -> float:
    """Return `value` rounded to `places` behind the point; halves are rounded up, as in print."""
    return float(Fraction(floor(value * 10**places + Fraction(1, 2)), 10**places))


class FigureSet(Part, frozen=True, kw_only=True):
    """The figures of one table or claim of a paper.

    conventions: how the computed values are counted, in words, by the convention's name.
    why: the reason for the gaps between published and computed values.
    not_computed: claims that nothing is computed for, and why not.
    """

    name: str
    title: str
    source: str
    conventions: dict[str, str]
    why: str
    figures: tuple[Figure, ...]
    not_computed: dict[str, str] = msgspec.field(default_factory=dict)


@cache
def figure_sets() -> dict[str, FigureSet]:
    """Return all sets of published.yaml by name, in the order of the file."""
    return packaged_rows("published.yaml", "sets", FigureSet)
