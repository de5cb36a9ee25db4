"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the features in two halves as in Llama."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0
"""The base of the angles, section 3.3 of the paper."""


def rope_cos_sin(
    past_tokens: int, tokens: int, head_dim: int, device: torch.device, base: float = BASE
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [T, head_dim // 2] in float32, for `tokens` tokens after `past_tokens` others.

    At position t the pair of features i is rotated by the angle t base^(-2i / head_dim).
    """
    pairs = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    positions = torch.arange(past_tokens, past_tokens + tokens, device=device, dtype=torch.float32)
    angles = positions[:, None] * base ** (-2 * pairs / head_dim)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, H, d] rotated by its positions' angles, in x's dtype. The last feature of an odd d stays."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [T, 1, d / 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
