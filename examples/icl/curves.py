"""Curves over log-wide bins, and their mean and spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PER_OCTAVE = 2
"""Bins per doubling of the context or the distance."""


def bin_edges(context: int) -> list[int]:
    """Return where the bins begin, and last where the last one ends: 1, 2, 3, 4, 6, 8, 11, 16 ... context + 1.

    Two per octave: round(2^(i/2)), the whole numbers only once. A bin holds its first place and not the next one's.
    """
    octaves = round(math.log2(context) * PER_OCTAVE)
    return [*sorted({round(2 ** (index / PER_OCTAVE)) for index in range(octaves)}), context + 1]


@dataclass
class Tally:
    """Sums and counts of a measure, by bin."""

    edges: list[int]

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(self.edges) - 1, dtype=torch.float64)
        self.counts = torch.zeros(len(self.edges) - 1, dtype=torch.long)

    def add(self, values: Tensor, place: Tensor) -> None:
        """Add `values` at their places, both [N]."""
        index = torch.bucketize(place, torch.tensor(self.edges), right=True) - 1
        self.sums.index_add_(0, index, values.double())
        self.counts.index_add_(0, index, torch.ones_like(index))

    def means(self) -> list[float | None]:
        """Return the mean of each bin, None where nothing fell into it."""
        pairs = zip(self.sums.tolist(), self.counts.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation of a sample (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(curves: Sequence[Sequence[float | None]]) -> list[tuple[float, float] | None]:
    """Return mean and spread of each bin over the runs that have it; None where none has."""
    found: list[tuple[float, float] | None] = []
    for column in zip(*curves, strict=True):
        values = [value for value in column if value is not None]
        found.append(mean_and_spread(values) if values else None)
    return found
