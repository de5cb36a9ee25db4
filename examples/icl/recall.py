"""The task `recall`: keys are given values first; from then on every token asks for the value of one of them.

Associative recall (Arora et al. 2023, arXiv 2312.04927, section 3) in a form that a small model learns in minutes. One
token states a key with its value, so that a single layer can answer, and what is compared is what a state holds, and
for how long: where key and value are two tokens, a layer has to learn first to look one token back. Answers are not
shown, so a statement is the only place where its value stands.
"""

from __future__ import annotations

from typing import Any

import torch

from icl.settings import TaskSettings
from icl.tasks import Batch, generator

KEYS, VALUES = 16, 4

HALVINGS = 5
"""Training steps take all statements, half of them, and so on down to one in turn: the few teach the many."""

QUESTIONS = KEYS * VALUES
"""The token that asks for key 0; key k has value v is token k VALUES + v, and v is the answer."""

HELD_OUT_SEED = 2**40
"""No training run has this seed."""


class Recall:
    """T / 8 statements (at most KEYS), each of another key, then questions, each for any of the keys stated.

    place: tokens from the statement to the question.
    """

    name = "recall"
    vocabulary = QUESTIONS + KEYS
    measure = "accuracy"
    unit = "share of right answers"
    over = "distance in tokens"

    def __init__(self, settings: TaskSettings) -> None:
        self.context, self.batch_size, self.held_out_count = settings.context, settings.batch, settings.held_out
        self.statements = min(KEYS, settings.context // 8)

    @property
    def chance(self) -> float:
        """Accuracy of one who knows which tokens are answers, and no more."""
        return 1 / VALUES

    def batch(self, seed: int, step: int) -> Batch:
        return self.sequences(self.batch_size, max(1, self.statements >> step % HALVINGS), generator(seed, step))

    def held_out(self) -> Batch:
        return self.sequences(self.held_out_count, self.statements, generator(HELD_OUT_SEED, 0))

    def sequences(self, count: int, number: int, rng: torch.Generator) -> Batch:
        """Return `count` sequences of `number` statements each."""
        context = self.context
        keys = torch.rand(count, KEYS, generator=rng).argsort(1)[:, :number]
        values = torch.randint(VALUES, (count, number), generator=rng)
        stated = torch.randint(number, (count, context - number), generator=rng)
        tokens = torch.cat((keys * VALUES + values, QUESTIONS + keys.gather(1, stated)), 1)
        place = torch.zeros_like(tokens)
        place[:, number:] = torch.arange(number, context) - stated
        targets = torch.zeros_like(tokens)
        targets[:, number:] = values.gather(1, stated)
        return Batch(tokens, targets, place)

    def describe(self) -> dict[str, Any]:
        return {
            "source": "generated",
            "statements": self.statements,
            "keys": KEYS,
            "values": VALUES,
            "baselines": {"chance": self.chance},
        }
