"""Sizes and training settings of each task, by preset. The command line can change some of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from powerplan.errors import InputError, allowed_values

CONTEXTS = (64, 16_384)
"""Shortest and longest context in tokens. Contexts are powers of two, because the bins of the curves are."""


@dataclass(frozen=True)
class TaskSettings:
    """Settings of one task: the model around the mixers, the data, and the optimizer AdamW.

    Attributes:
        context: Tokens of a sequence.
        batch: Sequences of a training step.
        steps: Training steps of softmax attention. Under --match flops their FLOPs are the budget of every mixer.
        hidden_size: Features of a token.
        layers: Layers.
        heads: Attention heads of a layer.
        head_dim: Features of a head.
        intermediate_size: Width of the MLP.
        held_out: Sequences that are evaluated.
        rates: Peak learning rate of each mixer.
        gain: Factor on the first weights of the matrices in layers, beyond `icl.run.scale_weights`.
        flops: The budget of every mixer in FLOPs, in place of `steps`.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of matrices.
        clip: Largest norm of the gradient.
    """

    context: int
    batch: int
    steps: int
    hidden_size: int
    layers: int
    heads: int
    head_dim: int
    intermediate_size: int
    held_out: int
    rates: dict[str, float]
    gain: float = 1.0
    flops: int | None = None
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0

    def changed(self, **options: Any) -> TaskSettings:
        """Return these settings with the given options. An option of None changes nothing."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})


def check_context(context: int) -> int:
    """Return `context`. Raises InputError unless it is a power of two within CONTEXTS."""
    low, high = CONTEXTS
    if not low <= context <= high or context & (context - 1):
        raise InputError(f"{context:,} is not a power of two from {low} to {high:,}", "--context")
    return context


def preset(name: str) -> dict[str, TaskSettings]:
    """Return the settings of each task. Raises InputError for an unknown preset."""
    if name not in PRESETS:
        raise InputError(f"{name!r} is not a preset{allowed_values(name, sorted(PRESETS))}", "--preset")
    return PRESETS[name]


_RATES = {"softmax": 4e-3, "window": 4e-3, "linear": 4e-3, "power": 4e-3, "mix": 4e-3}

PRESETS = {
    "laptop": {
        "code": TaskSettings(
            context=1024,
            batch=2,
            steps=1200,
            hidden_size=64,
            layers=2,
            heads=4,
            head_dim=16,
            intermediate_size=128,
            held_out=256,
            rates=_RATES,
        ),
        "recall": TaskSettings(
            context=256,
            batch=8,
            steps=1400,
            hidden_size=64,
            layers=2,
            heads=4,
            head_dim=16,
            intermediate_size=128,
            held_out=128,
            rates=_RATES,
            gain=5.0,
        ),
    },
    "tiny": {
        task: TaskSettings(
            context=128,
            batch=2,
            steps=6,
            hidden_size=16,
            layers=2,
            heads=2,
            head_dim=8,
            intermediate_size=16,
            held_out=4,
            rates=_RATES,
        )
        for task in ("code", "recall")
    },
}
