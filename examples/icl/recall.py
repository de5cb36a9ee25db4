"""The task `recall`: pairs of a key and a value are stated first; later every key is asked once, among other tokens.

After multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, section 3 and appendix), with distances that
grow with the context. Only the answers are scored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from icl.settings import TaskSettings
from icl.tasks import Batch, generator

KEYS, VALUES, FILLERS = 128, 32, 32
"""Tokens of each sort; they do not overlap."""

FEWEST = 4
"""Training."""

HELD_OUT_SEED = 2**40
"""No training run has this seed."""


class Recall:
    """T + 1 tokens: T / 32 pairs (at most KEYS), then slots of two tokens, a key with its value or fillers.

    place: tokens from a key's first statement to the slot where it is asked.
    """

    name = "recall"
    vocabulary = KEYS + VALUES + FILLERS
    measure = "accuracy"
    unit = "share of answers"
    over = "distance in tokens"

    def __init__(self, settings: TaskSettings) -> None:
        self.context, self.batch_size, self.held_out_count = settings.context, settings.batch, settings.held_out
        self.pairs = min(KEYS, settings.context // 8)

    @property
    def chance(self) -> float:
        """Accuracy of one who knows which tokens are values, and no more."""
        return 1 / VALUES

    def batch(self, seed: int, step: int) -> Batch:
        rng = generator(seed, step)
        fewer = int(torch.randint(FEWEST, (), generator=rng))
        return self.sequences(self.batch_size, self.pairs >> fewer, rng)

    def held_out(self) -> Batch:
        return self.sequences(self.held_out_count, self.pairs, generator(HELD_OUT_SEED, 0))

    def sequences(self, count: int, pairs: int, rng: torch.Generator) -> Batch:
        """Return `count` sequences. A slot is the likelier to ask the earlier it comes: distances spread log-wide."""
        slots = (self.context + 1) // 2 - pairs
        keys = _drawn(torch.ones(KEYS), pairs, count, rng)
        values = KEYS + torch.randint(VALUES, (count, pairs), generator=rng)
        tokens = KEYS + VALUES + torch.randint(FILLERS, (count, self.context + 1), generator=rng)
        scored = torch.zeros(count, self.context, dtype=torch.bool)
        place = torch.zeros(count, self.context, dtype=torch.long)
        stated = 2 * torch.arange(pairs).expand(count, -1)
        tokens.scatter_(1, stated, keys).scatter_(1, stated + 1, values)
        asked = 2 * (pairs + _drawn(1 / torch.arange(1, slots + 1), pairs, count, rng))
        tokens.scatter_(1, asked, keys).scatter_(1, asked + 1, values)
        scored.scatter_(1, asked, torch.ones_like(asked, dtype=torch.bool))
        place.scatter_(1, asked, asked - stated)
        return Batch(tokens, scored, place)

    def describe(self) -> dict[str, Any]:
        return {
            "source": "generated",
            "pairs": self.pairs,
            "keys": KEYS,
            "values": VALUES,
            "fillers": FILLERS,
            "baselines": {"chance": self.chance},
        }


def _drawn(weights: Tensor, number: int, count: int, rng: torch.Generator) -> Tensor:
    """Return [count, number] places of `weights`, by weight, without repetition within a row, in random order."""
    found = torch.multinomial(weights.expand(count, -1), number, generator=rng)  # the heavy ones tend to come first
    return found.gather(1, torch.rand(count, number, generator=rng).argsort(1))
