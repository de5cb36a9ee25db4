"""What a task offers: training batches that depend on seed and step alone, and held-out sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences, what the model must predict at each token, and where each prediction belongs on the curve.

    Attributes:
        tokens: Token ids [B, T], int64.
        targets: The right prediction at each token [B, T], int64.
        curve_x: Where each prediction counts on the x axis of the curve [B, T], int64: bytes of context, or tokens
            since the statement. 0 means that the prediction does not count.
    """

    tokens: Tensor
    targets: Tensor
    curve_x: Tensor

    @property
    def scored(self) -> Tensor:
        """Bool [B, T], true where the prediction counts."""
        return self.curve_x > 0

    def part(self, rows: slice) -> Batch:
        """Return the sequences `rows`."""
        return Batch(self.tokens[rows], self.targets[rows], self.curve_x[rows])


class Task(Protocol):
    """A task.

    Attributes:
        name: Its name on the command line.
        vocabulary: Number of token ids.
        measure: What is evaluated: "loss" (bits per token) or "accuracy" (share of right predictions).
        unit: The measure in words, the label of the y axis.
        x_label: The label of the x axis.
    """

    name: str
    vocabulary: int
    measure: str
    unit: str
    x_label: str

    def batch(self, seed: int, step: int) -> Batch:
        """Return the training batch of a step. It is the same for every mixer."""

    def held_out(self) -> Batch:
        """Return the sequences that are evaluated: the same in every run, and in no training batch."""

    def describe(self) -> dict[str, Any]:
        """Describe the data as JSON for the result. "baselines" holds what simple predictors reach, by name."""


def generator(*numbers: int) -> torch.Generator:
    """Return a random generator that is seeded by `numbers`, such as seed and step."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(seed)
