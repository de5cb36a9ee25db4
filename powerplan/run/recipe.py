"""How a model is trained: the optimizer and its number formats, what is recomputed, the loss, the batch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

from powerplan.choices import Kernels, Loss, Master, MatmulsDtype, Optimizer, Recompute, TrainingDtype
from powerplan.dtypes import DTYPE_BYTES
from powerplan.errors import InputError, check_word, parameter

LOSS_CHUNK = 4096
"""Tokens whose logits exist at once where the loss is chunked."""

SCALED_TOGETHER = 128
"""Elements of an activation that share an fp32 scale in fp8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""


@dataclass(frozen=True)
class Recipe:
    """What a training run does in each step, and in which number formats.

    optimizer: "adamw" keeps two moments a parameter; "adamw-8bit" keeps them in 8 bits with a scale for each block
    of 256; "muon" keeps one moment of matrices within layers, and AdamW's two of everything else.
    dtype: the format of weights in matmuls and of activations.
    master: "fp32" keeps a copy of the weights in fp32 that the optimizer works on; "none" keeps none.
    matmuls_dtype: that of the operands of layers' products with weights, in both passes, where it is not `dtype`: "fp8"
    as DeepSeek-V3 trains (arXiv 2412.19437, section 3.3). Routers, attention, embedding and LM head stay in `dtype`.
    gradients_dtype, moments_dtype: those of gradients that wait for the optimizer, and of its moments; fp32 with a
    master copy and `dtype` without one, where None.
    recompute: "none" keeps all that the backward pass needs; "selective" keeps it but for norms, activation functions
    and gates, which are computed again; "full" keeps the input of each layer and computes the layer again.
    loss: "whole" has the logits of all tokens at once; "chunked" those of LOSS_CHUNK tokens, with their gradient.
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
    gradients_dtype: TrainingDtype | None = None
    moments_dtype: TrainingDtype | None = None
    matmuls_dtype: MatmulsDtype | None = None

    def __post_init__(self) -> None:
        words = {
            "optimizer": Optimizer,
            "dtype": TrainingDtype,
            "master": Master,
            "recompute": Recompute,
            "loss": Loss,
            "kernels": Kernels,
            "gradients_dtype": TrainingDtype,
            "moments_dtype": TrainingDtype,
            "matmuls_dtype": MatmulsDtype,
        }
        optional = ("gradients_dtype", "moments_dtype", "matmuls_dtype")
        for name, kind in words.items():
            value = getattr(self, name)
            if value is not None or name not in optional:
                check_word(value, get_args(kind), parameter(name))
        if self.matmuls_dtype is not None and self.dtype != "bf16":
            problem = f"{self.matmuls_dtype} goes with activations in bf16, and {parameter('dtype')} is {self.dtype}"
            raise InputError(problem, parameter("matmuls_dtype"))

    @property
    def activation_bytes(self) -> Fraction:
        """Bytes of an element of an activation, and of a weight in a matmul."""
        return DTYPE_BYTES[self.dtype]

    @property
    def sent_to_experts(self) -> Fraction:
        """Bytes of an element that a token sends to an expert, over those that come back, which are activations.

        With fp8 matmuls the inputs of experts are sent in fp8 with a scale for each 128 of them, forward, and the
        gradients of their outputs backward; what comes back stays in bf16 (arXiv 2412.19437, section 3.3.3).
        """
        if self.matmuls_dtype is None:
            return Fraction(1)
        return (DTYPE_BYTES[self.matmuls_dtype] + DTYPE_BYTES["fp32"] / SCALED_TOGETHER) / self.activation_bytes

    @property
    def master_bytes(self) -> Fraction:
        """Bytes of a weight that the optimizer works on."""
        return DTYPE_BYTES["fp32"] if self.master == "fp32" else self.activation_bytes

    @property
    def gradient_bytes(self) -> Fraction:
        """Bytes of a gradient that waits for the optimizer."""
        return DTYPE_BYTES[self.gradients_dtype] if self.gradients_dtype else self.master_bytes

    @property
    def moment_bytes(self) -> Fraction:
        """Bytes of a moment of the optimizer that is not kept in 8 bits."""
        return DTYPE_BYTES[self.moments_dtype] if self.moments_dtype else self.master_bytes
