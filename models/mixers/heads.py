"""What mixers with query heads and key/value heads share: projections, qk-norm, positions, gates.

Shapes: B batch, T time, m hidden size, H query heads, G key/value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.mixers import FeatureAttention, GroupedHeads
from powerplan.models.mixers.base import SequenceMixer
from powerplan.models.rope import angles, rotate

INITIAL_GATE = 0.999
"""What a gate keeps of the past per token at first, as in the training code of arXiv 2507.04239 (power-attention,
train/model.py). Half, as by a plain sigmoid, forgets everything within a few tokens, and learns slowly not to."""

GATE_OFFSET = math.log(INITIAL_GATE / (1 - INITIAL_GATE))
"""Stands before the sigmoid of every gate, so that gates without a bias begin at INITIAL_GATE too."""

Heads = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], and log_g [B, T, G] in float32 at least where the mixer is gated."""


class HeadedMixer(SequenceMixer):
    """[B, T, m] -> [B, T, m]: `project` to heads, `mix` over the sequence (a subclass says how), `merge` the heads."""

    def __init__(self, mixer: GroupedHeads, hidden: int, *, rope: bool, **settings: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads = mixer.heads, mixer.kv_heads
        self.head_dim, self.v_head_dim = mixer.head_dim, mixer.v_head_dim
        self.rope = rope
        bias = bool(mixer.bias)
        queries, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        values = mixer.heads * mixer.v_head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias, **settings)
        self.k_proj = nn.Linear(hidden, keys, bias=bias, **settings)
        self.v_proj = nn.Linear(hidden, mixer.kv_heads * mixer.v_head_dim, bias=bias, **settings)
        self.o_proj = nn.Linear(values, hidden, bias=mixer.bias is True, **settings)
        gated = isinstance(mixer, FeatureAttention) and mixer.gated
        self.g_proj = nn.Linear(hidden, mixer.kv_heads, bias=bias, **settings) if gated else None
        self.output_gate = nn.Linear(hidden, values, bias=bias, **settings) if mixer.output_gate else None
        self.qk_norm = mixer.qk_norm
        if mixer.qk_norm != "none":
            whole = mixer.qk_norm == "full"
            self.q_norm = nn.RMSNorm(queries if whole else mixer.head_dim, eps=1e-6, **settings)
            self.k_norm = nn.RMSNorm(keys if whole else mixer.head_dim, eps=1e-6, **settings)

    def run(self, x: Tensor, seen: int, state: Any, *, keep: bool) -> tuple[Tensor, Any]:
        out, state = self.mix(*self.project(x, seen), state, keep=keep)
        return self.merge(x, out), state

    def project(self, x: Tensor, seen: int = 0) -> Heads:
        """Return the heads of the hidden state [B, T, m] of the tokens after `seen`, normalised and turned."""
        q, k = self.q_proj(x), self.k_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.unflatten(-1, (self.heads, self.head_dim)), k.unflatten(-1, (self.kv_heads, self.head_dim))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            turns = angles(seen, x.shape[1], self.head_dim, x.device)
            q, k = rotate(q, *turns), rotate(k, *turns)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.v_head_dim))
        q, k = q.to(v.dtype), k.to(v.dtype)  # On CUDA, autocast leaves norms in float32.
        if self.g_proj is None:
            return q, k, v, None
        gate = self.g_proj(x)
        return q, k, v, F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)) + GATE_OFFSET)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Any, *, keep: bool
    ) -> tuple[Tensor, Any]:
        """Return [B, T, H, V], and the state after these tokens where `keep` is set."""
        raise NotImplementedError

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the heads' outputs [B, T, H, V] back in the hidden size; x is what `project` was given."""
        out = out.flatten(-2)
        if self.output_gate is not None:
            out = out * self.output_gate(x).sigmoid()
        result: Tensor = self.o_proj(out)
        return result
