"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the features in two halves as in Llama."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0


def angles(seen: int, tokens: int, head_dim: int, device: torch.device, base: float = BASE) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, head_dim // 2] in float32: position t turns pair i by t base^(-2i / head_dim).

    The positions are those of `tokens` tokens after `seen` others.
    """
    steps = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    turns = torch.arange(seen, seen + tokens, device=device, dtype=torch.float32)[:, None] * base ** (
        -2 * steps / head_dim
    )
    return turns.cos(), turns.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return [B, T, H, d] turned by its positions, in x's dtype; the last feature of an odd d stays."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [T, 1, d / 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
