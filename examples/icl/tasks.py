"""What a task has to offer: batches that follow from a seed and a step, and held-out sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """tokens [B, T + 1]; scored [B, T]: whether the prediction of the token after each of the first T counts.

    place [B, T]: what its curve is drawn over, from 1: bytes of context, or the distance of what is recalled.
    """

    tokens: Tensor
    scored: Tensor
    place: Tensor


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
