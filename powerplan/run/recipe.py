"""How a model is trained: the optimizer and its number formats, what is recomputed, the loss, the batch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

from powerplan.choices import Kernels, Loss, Master, Optimizer, Recompute, TrainingDtype
from powerplan.dtypes import DTYPE_BYTES
from powerplan.errors import InputError, allowed_values, parameter, shown

LOSS_CHUNK = 4096
"""Tokens whose logits exist at once where the loss is chunked."""


@dataclass(frozen=True)
class Recipe:
    """What a training run does in each step, and in which number formats.

    optimizer: "adamw" keeps two moments a parameter; "adamw-8bit" keeps them in 8 bits with a scale for each block
    of 256; "muon" keeps one moment of matrices within layers, and AdamW's two of everything else.
    dtype: the format of weights in matmuls and of activations.
    master: "fp32" keeps weights, gradients and moments in fp32; "none" keeps them all in `dtype`.
    recompute: "none" keeps all that the backward pass needs; "selective" keeps it but for norms, activation functions
    and gates, which are computed again; "full" keeps the input of each layer and computes the layer again.
    loss: "whole" has the logits of all tokens at once; "chunked" those of LOSS_CHUNK tokens, and their gradient at once.
    micro_batch: sequences that a device works on at once.
    kernels: "fused" keeps what fused GPU kernels keep; "torch" what powerplan.models keeps on a CPU.
    """

    optimizer: Optimizer = "adamw"
    dtype: TrainingDtype = "bf16"
    master: Master = "fp32"
    recompute: Recompute = "none"
    loss: Loss = "whole"
    micro_batch: int = 1
    kernels: Kernels = "fused"

    def __post_init__(self) -> None:
        words = {
            "optimizer": Optimizer,
            "dtype": TrainingDtype,
            "master": Master,
            "recompute": Recompute,
            "loss": Loss,
            "kernels": Kernels,
        }
        for name, kind in words.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise InputError(f"{shown(value)} is not known{allowed_values(value, get_args(kind))}", parameter(name))

    @property
    def activation_bytes(self) -> Fraction:
        """Bytes of an element of an activation, and of a weight in a matmul."""
        return DTYPE_BYTES[self.dtype]

    @property
    def kept_bytes(self) -> Fraction:
        """Bytes of an element of what the optimizer works on: its weights, gradients and moments."""
        return DTYPE_BYTES["fp32"] if self.master == "fp32" else self.activation_bytes
