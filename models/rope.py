"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the features in two halves as in Llama.

Frequencies are those of transformers (modeling_rope_utils.py) for each kind of scaling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from powerplan.errors import InputError
from powerplan.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rope,
    YarnScaling,
)


def rope_cos_sin(
    past_tokens: int,
    tokens: int,
    head_dim: int,
    device: torch.device,
    rope: Rope | None = None,
    context: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [T, rotated // 2] in float32, for `tokens` tokens after `past_tokens` others.

    At position t the pair of features i is rotated by the angle t base^(-2i / rotated), which a scaling changes.

    Args:
        past_tokens: Tokens before these.
        tokens: T.
        head_dim: Features of a head. The first `partial` of them are rotated.
        device: Where the result is made.
        rope: Base, share and scaling. None stands for the base 10,000 and whole heads.
        context: Tokens of the sequence, which some scalings depend on. None: it ends with these tokens.

    Raises:
        InputError: The factors of a LongRoPE are for heads of another size.
    """
    rope = rope or Rope()
    positions = torch.arange(past_tokens, past_tokens + tokens, device=device, dtype=torch.float32)
    angles = positions[:, None] * frequencies(rope, head_dim, context or past_tokens + tokens, device)
    scale = rope.attention_scale
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


def frequencies(rope: Rope, head_dim: int, context: int, device: torch.device) -> Tensor:
    """Return the angle per token of each pair of features, [rotated // 2] in float32, for a context of so many tokens.

    Raises InputError where the factors of a LongRoPE are for heads of another size.
    """
    scaling, rotated = rope.scaling, rope.rotated(head_dim)
    if isinstance(scaling, ProportionalScaling):
        return _proportional(rope.theta, scaling, head_dim, int(rope.partial * head_dim // 2), device)
    theta = rope.theta
    if isinstance(scaling, DynamicScaling) and rotated > 2:
        longest = max(context, scaling.original_context)
        grown = scaling.factor * longest / scaling.original_context - (scaling.factor - 1)
        theta *= grown ** (rotated / (rotated - 2))
    turns = 1.0 / theta ** _exponents(rotated // 2, rotated, device)
    if isinstance(scaling, LinearScaling):
        return turns / scaling.factor
    if isinstance(scaling, YarnScaling):
        return _yarn(turns, theta, scaling, rotated)
    if isinstance(scaling, Llama3Scaling):
        return _llama3(turns, scaling)
    if isinstance(scaling, LongRopeScaling):
        divisors = scaling.long_factor if context > scaling.original_context else scaling.short_factor
        if len(divisors) != rotated // 2:
            pairs = f"{len(divisors)} factors of LongRoPE for {rotated // 2} pairs of features"
            raise InputError(f"{pairs}: heads of {head_dim} with partial {rope.partial:g} have so many")
        return turns / torch.tensor(divisors, device=device, dtype=torch.float32)
    return turns


def _exponents(pairs: int, features: int, device: torch.device) -> Tensor:
    return torch.arange(0, 2 * pairs, 2, device=device, dtype=torch.float32) / features


def _proportional(
    theta: float, scaling: ProportionalScaling, head_dim: int, rotated_pairs: int, device: torch.device
) -> Tensor:
    turns = 1.0 / theta ** _exponents(rotated_pairs, head_dim, device)
    still = torch.zeros(head_dim // 2 - rotated_pairs, device=device)
    return torch.cat((turns, still)) / scaling.factor


def _yarn(turns: Tensor, theta: float, scaling: YarnScaling, rotated: int) -> Tensor:
    """Mix the angles with their quotients (arXiv 2309.00071, section 3.2)."""

    def pair_of(rotations: float) -> float:
        return rotated * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    high = high + 0.001 if low == high else high
    ramp = torch.arange(turns.shape[0], device=turns.device, dtype=torch.float32)
    divided = ((ramp - low) / (high - low)).clamp(0, 1)
    return turns / scaling.factor * divided + turns * (1 - divided)


def _llama3(turns: Tensor, scaling: Llama3Scaling) -> Tensor:
    lengths = 2 * math.pi / turns
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rotations = scaling.original_context / lengths
    whole = (rotations > low).float() if low == high else ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - whole) * turns / scaling.factor + whole * turns


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, H, d] rotated by its positions' angles, in x's dtype. Features beyond those of cos stay."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [T, 1, d / 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
