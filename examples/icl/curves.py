"""Measures in bins whose width grows with the position, and their mean and spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS_PER_OCTAVE = 2
"""Bins for each doubling of the position."""


def bin_edges(context: int) -> list[int]:
    """Return where the bins begin, and at the end where the last bin ends: 1, 2, 3, 4, 6, 8, 11, 16 ... context + 1.

    The edges are round(2^(i / BINS_PER_OCTAVE)), each whole number once. A bin includes its first edge and excludes the
    next one.
    """
    octaves = round(math.log2(context) * BINS_PER_OCTAVE)
    return [*sorted({round(2 ** (index / BINS_PER_OCTAVE)) for index in range(octaves)}), context + 1]


@dataclass
class Tally:
    """Sum and count of a measure in each bin."""

    edges: list[int]

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(self.edges) - 1, dtype=torch.float64)
        self.counts = torch.zeros(len(self.edges) - 1, dtype=torch.long)

    def add(self, values: Tensor, curve_x: Tensor) -> None:
        """Add `values` [N] to the bins of their positions `curve_x` [N]."""
        index = torch.bucketize(curve_x, torch.tensor(self.edges), right=True) - 1
        self.sums.index_add_(0, index, values.double())
        self.counts.index_add_(0, index, torch.ones_like(index))

    def means(self) -> list[float | None]:
        """Return the mean of each bin, None for an empty bin."""
        pairs = zip(self.sums.tolist(), self.counts.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, which is 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(curves: Sequence[Sequence[float | None]]) -> list[tuple[float, float] | None]:
    """Return mean and spread of each bin over the runs with a value in it, None where no run has one."""
    points: list[tuple[float, float] | None] = []
    for column in zip(*curves, strict=True):
        values = [value for value in column if value is not None]
        points.append(mean_and_spread(values) if values else None)
    return points
