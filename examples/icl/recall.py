"""The task `recall`: keys are given values first. From then on every token asks for the value of one of them.

This is associative recall (Arora et al. 2023, arXiv 2312.04927, section 3) in a form that a small model learns in
minutes. One token states a key together with its value, so that a single layer can answer. (If key and value were two
tokens, a layer would first have to learn to look one token back.) What is compared is how much a state holds, and for
how long. The answers are not shown to the model, so the statement is the only token that tells the value.
"""

from __future__ import annotations

from typing import Any

import torch

from icl.settings import TaskSettings
from icl.tasks import Batch, generator

KEYS = 16
"""Keys that can be stated."""

VALUES = 4
"""Values that a key can have."""

HALVINGS = 5
"""Training steps take all statements, half of them, a quarter and so on, this many in turn. Few statements are easier
to learn, and what is learned from them helps with many."""

QUESTIONS = KEYS * VALUES
"""The token that asks for key 0; QUESTIONS + k asks for key k. Token k VALUES + v states that key k has value v, and v
is the answer."""

HELD_OUT_SEED = 2**40
"""The seed of the held-out sequences, which no training run has."""


class Recall:
    """Sequences of T / 8 statements (at most KEYS) of different keys, then questions for any of the stated keys.

    The curve is drawn over the distance in tokens from the statement to the question.
    """

    name = "recall"
    vocabulary = QUESTIONS + KEYS
    measure = "accuracy"
    unit = "share of right answers"
    x_label = "distance in tokens"

    def __init__(self, settings: TaskSettings) -> None:
        self.context, self.batch_size, self.held_out_count = settings.context, settings.batch, settings.held_out
        self.statements = min(KEYS, settings.context // 8)

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the values."""
        return 1 / VALUES

    def batch(self, seed: int, step: int) -> Batch:
        return self.sequences(self.batch_size, max(1, self.statements >> step % HALVINGS), generator(seed, step))

    def held_out(self) -> Batch:
        return self.sequences(self.held_out_count, self.statements, generator(HELD_OUT_SEED, 0))

    def sequences(self, count: int, statements: int, rng: torch.Generator) -> Batch:
        """Return `count` random sequences with `statements` statements each."""
        context = self.context
        keys = torch.rand(count, KEYS, generator=rng).argsort(1)[:, :statements]
        values = torch.randint(VALUES, (count, statements), generator=rng)
        target_index = torch.randint(statements, (count, context - statements), generator=rng)
        tokens = torch.cat((keys * VALUES + values, QUESTIONS + keys.gather(1, target_index)), 1)
        curve_x = torch.zeros_like(tokens)
        curve_x[:, statements:] = torch.arange(statements, context) - target_index
        targets = torch.zeros_like(tokens)
        targets[:, statements:] = values.gather(1, target_index)
        return Batch(tokens, targets, curve_x)

    def describe(self) -> dict[str, Any]:
        return {
            "source": "generated",
            "statements": self.statements,
            "keys": KEYS,
            "values": VALUES,
            "baselines": {"chance": self.chance},
        }
