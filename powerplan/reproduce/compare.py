"""Compares each published figure with the values that powerplan computes for it, one for each convention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from powerplan.errors import check_word
from powerplan.reproduce.field import field, memory_remark
from powerplan.reproduce.figures import Figure, FigureSet, figure_sets
from powerplan.reproduce.hybrids import hybrids, kimi, kimi_state
from powerplan.reproduce.power import Computed, figure2, power_speed, table2, table3, table4
from powerplan.reproduce.training import efficiency, run_of, training, training_time

ALL = "all"
"""The name that stands for all sets."""

_COMPUTE: dict[str, Callable[[Figure], Computed]] = {
    "table2": table2,
    "table3": table3,
    "figure2": figure2,
    "table4": table4,
    "power-speed": power_speed,
    "kimi": kimi,
    "hybrids": hybrids,
    "field": field,
    "training": training,
    "training-time": training_time,
}
"""The function that computes the figures of each set."""


@dataclass(frozen=True)
class Comparison:
    """A published figure and the computed values, by convention, in the unit of the figure."""

    figure: Figure
    computed: Computed

    @property
    def agrees(self) -> list[str]:
        """The conventions under which the computed value, rounded like the published one, is the same."""
        return [name for name, value in self.computed.items() if self.figure.agrees(value)]

    @property
    def nearest(self) -> tuple[str, float]:
        """The convention whose value is nearest, and its relative deviation: 0.1 is 10 % above the published value."""
        gaps = {name: float(value / self.figure.number - 1) for name, value in self.computed.items()}
        return min(gaps.items(), key=lambda gap: abs(gap[1]))

    @property
    def source(self) -> str | None:
        """Where the figure is published, if not in the source of its set."""
        return run_of(self.figure).source if self.figure.run else self.figure.source

    @property
    def efficiency(self) -> Fraction | None:
        """The share of the bf16 peak that the figure's training run reached; None for other figures."""
        return efficiency(self.figure)


@dataclass(frozen=True)
class SetResult:
    """A set of figures and their comparisons, in the same order."""

    figures: FigureSet
    comparisons: tuple[Comparison, ...]

    def agreeing(self, convention: str) -> tuple[int, int]:
        """Return how many figures agree under a convention, and for how many it gives a value."""
        computed = [comparison for comparison in self.comparisons if convention in comparison.computed]
        return sum(convention in comparison.agrees for comparison in computed), len(computed)

    def remarks(self) -> list[str]:
        """Return sentences with numbers that belong to this set and stand in none of its figures."""
        runs = dict.fromkeys(run_of(one.figure) for one in self.comparisons if one.figure.run)
        if runs:
            sources = "; ".join(dict.fromkeys(run.source for run in runs))
            notes = dict.fromkeys(run.note for run in runs if run.note)
            return [f"Read in: {sources}.", *(f"Not modelled, or not known: {note}." for note in notes)]
        if self.figures.name == "field":
            return [memory_remark()]
        if self.figures.name != "power-speed":
            return [kimi_state()] if self.figures.name == "kimi" else []
        shares = [(one.figure.number / one.computed["chunked"], one.figure.what) for one in self.comparisons]
        text = " and ".join(f"{float(share):.0%} ({what})" for share, what in shares)
        return [f"Measured over promised, {text}, is the share of the other kernel's FLOP rate that power's reached."]


def reproduce(name: str = ALL) -> list[SetResult]:
    """Compare one set of powerplan/published.yaml, or "all" in the order of the file, with what powerplan computes."""
    sets = figure_sets()
    check_word(name, [*sets, ALL])
    return [
        SetResult(figures, tuple(Comparison(figure, _COMPUTE[figures.name](figure)) for figure in figures.figures))
        for figures in (sets.values() if name == ALL else [sets[name]])
    ]
