"""Published figures as data: what a paper prints, in which unit, and where."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from importlib.resources import files
from math import floor
from typing import Literal

import msgspec

from powerplan.documents import parse_yaml
from powerplan.mixers.base import Part
from powerplan.units import parse_ratio

Unit = Literal["", "ratio", "%", "x", "B", "GB"]


class Figure(Part, frozen=True, kw_only=True):
    """One figure as it is printed; the other fields say what to compute beside it.

    value: a number with the digits that are printed, or a ratio such as "1:8". source: where it is not the set's.
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

    @property
    def number(self) -> Fraction:
        """The value in its unit; weights over state for a ratio."""
        return parse_ratio(self.value) if isinstance(self.value, str) else Fraction(str(self.value))

    @property
    def decimals(self) -> int:
        """Digits behind the point, as printed."""
        return len(str(self.value).partition(".")[2])

    def printed(self) -> str:
        """Return the figure as a paper prints it."""
        return self.value if isinstance(self.value, str) else self.show(self.number)

    def show(self, value: Fraction, digits: int | None = None) -> str:
        """Return a value with the unit of this figure, with `digits` behind the point (those of the figure if None)."""
        places = self.decimals if digits is None else digits
        if self.unit == "ratio":
            side = f"{_rounded(max(value, 1 / value), places):,.{places}f}"
            return f"{side}:1" if value >= 1 or side == "1" else f"1:{side}"
        gap = " " if self.unit in ("%", "GB") else ""
        return f"{_rounded(value, places):,.{places}f}{gap}{self.unit}"

    def agrees(self, value: Fraction) -> bool:
        """Whether `value`, rounded as the figure is, prints the same."""
        return self.show(value) == self.show(self.number)

    def cut(self, value: Fraction) -> Fraction:
        """Return `value` with all digits cut off that are not printed."""
        scale = 10**self.decimals
        return Fraction(floor(value * scale), scale)


def _rounded(value: Fraction, places: int) -> float:
    """Return `value` rounded half up, as people round, to `places` behind the point."""
    scale = 10**places
    return float(Fraction(floor(value * scale + Fraction(1, 2)), scale))


class FigureSet(Part, frozen=True, kw_only=True):
    """The figures of one table or claim. conventions: how powerplan counts, by name; why: the reason for the gaps."""

    name: str
    title: str
    source: str
    conventions: dict[str, str]
    why: str
    figures: tuple[Figure, ...]


@cache
def figure_sets() -> dict[str, FigureSet]:
    """Return all sets by name, in the file's order."""
    text = (files("powerplan") / "published.yaml").read_text(encoding="utf-8")
    rows = parse_yaml(text, "published.yaml").data["sets"]
    return {row["name"]: msgspec.convert(row, FigureSet) for row in rows}
