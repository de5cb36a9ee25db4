"""Each published figure beside its computed values: where they agree as printed, and else by how much they miss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from powerplan.errors import InputError, allowed_values, shown
from powerplan.reproduce.figures import Figure, FigureSet, figure_sets
from powerplan.reproduce.hybrids import hybrids, kimi, kimi_state
from powerplan.reproduce.power import Computed, figure2, power_speed, table2, table3, table4

ALL = "all"

_COMPUTE: dict[str, Callable[[Figure], Computed]] = {
    "table2": table2,
    "table3": table3,
    "figure2": figure2,
    "table4": table4,
    "power-speed": power_speed,
    "kimi": kimi,
    "hybrids": hybrids,
}


@dataclass(frozen=True)
class Comparison:
    """A figure and what powerplan computes for it, by convention, in the figure's unit."""

    figure: Figure
    computed: Computed

    @property
    def agrees(self) -> list[str]:
        """The conventions under which the computed value prints as the published one."""
        return [name for name, value in self.computed.items() if self.figure.agrees(value)]

    @property
    def nearest(self) -> tuple[str, float]:
        """The convention that comes nearest, and by which share its value is more (or less) than the published one."""
        number = self.figure.number
        gaps = {name: float(value / number - 1) for name, value in self.computed.items()}
        name = min(gaps, key=lambda name: abs(gaps[name]))
        return name, gaps[name]


@dataclass(frozen=True)
class SetResult:
    """One set of figures, compared."""

    figures: FigureSet
    comparisons: tuple[Comparison, ...]

    def agreeing(self, convention: str) -> tuple[int, int]:
        """Return how many figures agree under a convention, and for how many it gives a value."""
        values = [item for item in self.comparisons if convention in item.computed]
        return sum(convention in item.agrees for item in values), len(values)

    def remarks(self) -> list[str]:
        """Return what the gaps of this set come to, in numbers."""
        if self.figures.name == "kimi":
            return [kimi_state()]
        if self.figures.name != "power-speed":
            return []
        shares = [(item.figure.number / item.computed["chunked"], item.figure.what) for item in self.comparisons]
        text = " and ".join(f"{float(share):.0%} ({what})" for share, what in shares)
        return [f"Measured over promised, {text}, is the share of the other kernel's FLOP rate that power's reached."]


def reproduce(name: str = ALL) -> list[SetResult]:
    """Return the comparisons of one set, or of all. Raises InputError for a name that is not known."""
    sets = figure_sets()
    if name != ALL and name not in sets:
        raise InputError(f"{shown(name)} is not known{allowed_values(name, [*sets, ALL])}")
    chosen = sets.values() if name == ALL else [sets[name]]
    return [
        SetResult(one, tuple(Comparison(figure, _COMPUTE[one.name](figure)) for figure in one.figures))
        for one in chosen
    ]
