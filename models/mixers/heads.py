"""What mixers with query heads and key/value heads share: projections, qk-norm, positions, gates.

Shapes: B batch, T tokens, m hidden size, H query heads, G key/value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.mixers import FeatureAttention, GroupedHeads
from powerplan.models.mixers.base import SequenceMixer, not_shared
from powerplan.models.rope import apply_rope, rope_cos_sin
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel

INITIAL_GATE = 0.999
"""What every gate is with the first weights: the share of the past that is kept per token, as in the training code of
arXiv 2507.04239 (power-attention, train/model.py). A plain sigmoid would begin at 0.5. Such a gate forgets everything
within a few tokens, and a model is slow to learn a longer memory."""

GATE_OFFSET = math.log(INITIAL_GATE / (1 - INITIAL_GATE))
"""Added before the sigmoid of every gate: sigmoid(GATE_OFFSET) is INITIAL_GATE, even for gates without a bias."""

Projected = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], and log_g [B, T, G] in float32 or float64, None without gates."""


class GroupedHeadsMixer(SequenceMixer):
    """[B, T, m] -> [B, T, m]: `project` to heads, `mix` over the sequence (by the subclass), `merge` the heads."""

    def __init__(self, mixer: GroupedHeads, hidden_size: int, *, rope: Rope | None, **factory_kwargs: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads = mixer.heads, mixer.kv_heads
        self.head_dim, self.v_head_dim = mixer.head_dim, mixer.v_head_dim
        self.rope = rope
        bias = mixer.input_bias
        queries, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        values = mixer.heads * mixer.v_head_dim
        self.q_proj = nn.Linear(hidden_size, queries, bias=bias, **factory_kwargs)
        self.k_proj = nn.Linear(hidden_size, keys, bias=bias, **factory_kwargs)
        self.v_proj = nn.Linear(hidden_size, mixer.kv_heads * mixer.v_head_dim, bias=bias, **factory_kwargs)
        self.o_proj = nn.Linear(values, hidden_size, bias=mixer.bias in (True, "output"), **factory_kwargs)
        gated = isinstance(mixer, FeatureAttention) and mixer.gated
        self.g_proj = nn.Linear(hidden_size, mixer.kv_heads, bias=bias, **factory_kwargs) if gated else None
        self.output_gate = None
        if mixer.output_gate == "head":
            self.output_gate = nn.Linear(hidden_size, mixer.heads, bias=False, **factory_kwargs)
        elif mixer.output_gate:
            self.output_gate = nn.Linear(hidden_size, values, bias=bias, **factory_kwargs)
        self.qk_norm = mixer.qk_norm
        if mixer.qk_norm != "none":
            all_heads = mixer.qk_norm == "full"
            self.q_norm = nn.RMSNorm(queries if all_heads else mixer.head_dim, eps=1e-6, **factory_kwargs)
            self.k_norm = nn.RMSNorm(keys if all_heads else mixer.head_dim, eps=1e-6, **factory_kwargs)

    def run(self, x: Tensor, past_tokens: int, state: Any, *, return_state: bool) -> tuple[Tensor, Any]:
        out, state = self.mix(*self.project(x, past_tokens), state, return_state=return_state)
        return self.merge(x, out), state

    def run_shared(self, x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Any]:
        out, state = self.mix_shared(*self.project_shared(x, cp), cp, return_state=return_state)
        return self.merge(x, out), state

    def project_shared(self, x: Tensor, cp: ContextParallel) -> Projected:
        """Return what `project` does of this rank's tokens x [B, t, m] of sequences that lie on several ranks."""
        # Positions are those within a sequence, of which this rank may have several parts.
        parts = [self.project(x[:, own], first, context) for own, first, context in cp.parts()] or [self.project(x)]
        q, k, v = (torch.cat(each, 1) if len(each) > 1 else each[0] for each in list(zip(*parts, strict=True))[:3])
        gates = [log_g for *_, log_g in parts if log_g is not None]
        return q, k, v, torch.cat(gates, 1) if gates else None

    def project(self, x: Tensor, past_tokens: int = 0, context: int | None = None) -> Projected:
        """Return queries, keys, values and log gates of x [B, T, m], with qk-norm and positions applied.

        context: tokens of the whole sequence; None where it ends with x.
        """
        q, k = self.q_proj(x), self.k_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.unflatten(-1, (self.heads, self.head_dim)), k.unflatten(-1, (self.kv_heads, self.head_dim))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            cos_sin = rope_cos_sin(past_tokens, x.shape[1], self.head_dim, x.device, self.rope, context)
            q, k = apply_rope(q, *cos_sin), apply_rope(k, *cos_sin)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.v_head_dim))
        q, k = q.to(v.dtype), k.to(v.dtype)  # On CUDA, autocast leaves norms in float32.
        if self.g_proj is None:
            return q, k, v, None
        gate = self.g_proj(x)
        return q, k, v, F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)) + GATE_OFFSET)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        """Return the heads' outputs [B, T, H, V], and the state after these tokens if `return_state`.

        state: what an earlier call returned for the tokens before these; None if there are none.
        """
        raise NotImplementedError

    def mix_shared(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        """Return the heads' outputs [B, t, H, V] of this rank's tokens of sequences that lie on several ranks, and the
        state after all of their tokens if `return_state`: what `mix` returns, the same on every rank.
        """
        raise not_shared(self)

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the output [B, T, m] from the heads' outputs `out` [B, T, H, V]; x [B, T, m] makes the output gate."""
        if self.output_gate is not None:
            # One gate for each head, or one for each feature of each head.
            out = out * self.output_gate(x).sigmoid().unflatten(-1, (self.heads, -1))
        result: Tensor = self.o_proj(out.flatten(-2))
        return result
