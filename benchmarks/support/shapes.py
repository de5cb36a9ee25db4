"""What is measured: shapes, variants of an implementation, and their FLOPs and bytes by the planner's formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from powerplan.dims import default_chunk_size, spow_dim
from powerplan.mixers import Attention, Convention, Linear, Power
from powerplan.mixers.formulas import total

PASSES = ("forward", "train", "decode")
"""train is forward and backward; decode is one more token after a context."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """One place where implementations are compared: a pass over `tokens` of context; K and V are head_dim."""

    kind: str
    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Return q [B, T, H, K], k and v [B, T, G, K], log_g [B, T, G] in (-0.01, 0]; one token of q for decode."""
        make = torch.Generator(self.device).manual_seed(seed)
        settings: dict[str, Any] = {"generator": make, "device": self.device, "dtype": DTYPES[self.dtype]}
        asked = 1 if self.kind == "decode" else self.tokens
        q = torch.randn(self.batch, asked, self.heads, self.head_dim, **settings)
        k, v = (torch.randn(self.batch, self.tokens, self.kv_heads, self.head_dim, **settings) for _ in range(2))
        gates = torch.rand(self.batch, self.tokens, self.kv_heads, generator=make, device=self.device)
        return {"q": q, "k": k, "v": v, "log_g": gates * -0.01}


@dataclass(frozen=True)
class Variant:
    """One implementation and its settings: degree, chunk size (its default where None) and gates, if they apply."""

    impl: str
    p: int | None = None
    chunk: int | None = None
    gated: bool | None = None

    @property
    def is_power(self) -> bool:
        return self.impl.startswith("power-")

    @property
    def is_softmax(self) -> bool:
        return self.impl.startswith(("sdpa-", "flex"))

    def __str__(self) -> str:
        parts = [self.impl]
        if self.p is not None:
            parts.append(f"p={self.p}")
        if self.chunk is not None:
            parts.append(f"chunk={self.chunk}")
        if self.gated:
            parts.append("gated")
        return " ".join(parts)

    def cost_exponent(self, kind: str) -> int:
        """Return how the cost grows with the context, as a power of it."""
        if kind == "decode":
            return int(self.is_softmax)
        return 2 if self.is_softmax else 1


def window_of_equal_state(shape: Shape, p: int) -> int:
    """Return the window whose keys and values are as many numbers as a state of degree p: D (V + 1) / (K + V)."""
    d = shape.head_dim
    return max(1, round(spow_dim(d, p) * (d + 1) / (2 * d)))


def normalized(variant: Variant) -> bool:
    """Return whether a power variant divides by the sum of weights: odd degrees cannot."""
    return (variant.p or 2) % 2 == 0


def engine_of(variant: Variant) -> str:
    """Return the engine whose default chunk size a variant of power attention takes."""
    return "triton" if variant.impl == "power-triton" else "torch"


def flops(shape: Shape, variant: Variant) -> int:
    """Return the FLOPs that the planner counts for a run of `variant`: causal pairs only, the backward pass twice that.

    What an implementation recomputes, or computes of the masked half, does not count for it.
    """
    heads: dict[str, Any] = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    form: Any = "recurrent" if shape.kind == "decode" else "chunked"
    if variant.is_softmax:
        mixer: Attention | Linear | Power = Attention(**heads)
    elif variant.impl.endswith("window"):
        mixer = Attention(**heads, window=window_of_equal_state(shape, variant.p or 2))
    elif variant.impl == "simple-gla":
        mixer = Linear(**heads, chunk_size=64)
    else:
        p = variant.p or 2
        chunk = variant.chunk or default_chunk_size(shape.head_dim, p, engine_of(variant))
        mixer = Power(**heads, p=p, chunk_size=chunk, normalize=normalized(variant))
    if shape.kind == "decode":
        # "full" counts every key of the context, which is what its last token sees.
        return shape.batch * int(total(mixer.state_flops_terms(shape.tokens, Convention("full", form))))
    per_token = total(mixer.state_flops_terms(shape.tokens, Convention("exact", form)))
    return int(shape.batch * shape.tokens * per_token) * (3 if shape.kind == "train" else 1)


def decode_bytes(shape: Shape, variant: Variant) -> int:
    """Return the bytes that one decoding step must move: a KV cache read, or a state read and written."""
    d = shape.head_dim
    if variant.is_power:
        columns = d + int(normalized(variant))
        return 2 * 4 * shape.batch * shape.kv_heads * spow_dim(d, variant.p or 2) * columns
    kept = shape.tokens
    if variant.impl.endswith("window"):
        kept = min(kept, window_of_equal_state(shape, variant.p or 2))
    return DTYPES[shape.dtype].itemsize * shape.batch * kept * shape.kv_heads * 2 * d
