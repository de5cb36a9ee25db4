"""What a task has to offer: batches that follow from a seed and a step, and held-out sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """tokens [B, T], and targets [B, T]: what is to be predicted at each.

    place [B, T]: what the curve is drawn over, bytes of context or the distance of what is recalled; 0 where the
    prediction does not count.
    """

    tokens: Tensor
    targets: Tensor
    place: Tensor

    @property
    def scored(self) -> Tensor:
        """Which predictions count, [B, T]."""
        return self.place > 0

    def part(self, rows: slice) -> Batch:
        """Return some of the sequences."""
        return Batch(self.tokens[rows], self.targets[rows], self.place[rows])


class Task(Protocol):
    """A task. measure says what `Curve` holds of it: "loss" in bits per token, or "accuracy"."""

    name: str
    vocabulary: int
    measure: str
    unit: str
    over: str

    def batch(self, seed: int, step: int) -> Batch:
        """Return the training batch of a step; the same for every mixer."""

    def held_out(self) -> Batch:
        """Return the sequences that are evaluated, the same for every run, in none of the training batches."""

    def describe(self) -> dict[str, Any]:
        """Return what the data are, for the result; baselines: what knows no context reaches, by name."""


def generator(*numbers: int) -> torch.Generator:
    """Return a generator of its own for each tuple of numbers (seed, step ...)."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(seed)
