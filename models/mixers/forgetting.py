"""Forgetting attention (FoX, Lin et al. 2025, arXiv 2503.02130, section 3): a forget gate lowers the scores.

Shapes: B batch, T queries, S keys, m hidden size, H query heads, G key/value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.kernels.distributed.gather import gather_tokens
from powerplan.kernels.distributed.stretches import joined_outputs
from powerplan.mixers import Forgetting
from powerplan.models.cache import GrowingBuffer
from powerplan.models.mixers.attention import by_halo, pieces_after_halo
from powerplan.models.mixers.fla import MAX_FORGETTING_TOKENS, fla_supports, forgetting_by_fla
from powerplan.models.mixers.heads import GroupedHeadsMixer, Projected
from powerplan.models.mixers.pieces import pieces, recomputed
from powerplan.models.mixers.ranks import compare_calls, heads_for_ranks, heads_for_tokens, tokens_for_heads

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class ForgettingAttention(GroupedHeadsMixer):
    """Softmax attention with a forget gate per query head and token, and without positions. [B, T, m] -> [B, T, m]."""

    def __init__(self, mixer: Forgetting, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, rope=None, **factory_kwargs)
        self.window = mixer.window
        self.forget_gate = nn.Linear(hidden_size, mixer.heads, **factory_kwargs)

    def project(self, x: Tensor, past_tokens: int = 0, context: int | None = None) -> Projected:
        """Return queries, keys, values, and the log gates [B, T, H] of the query heads."""
        q, k, v, _ = super().project(x, past_tokens, context)
        gate = self.forget_gate(x)
        return q, k, v, F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        assert log_g is not None
        if state is not None:
            k, v, log_g = state.k.append(k), state.v.append(v), state.log_g.append(log_g.to(v.dtype))
        elif return_state:
            state = GatedKeyValues(GrowingBuffer(k), GrowingBuffer(v), GrowingBuffer(log_g.to(v.dtype)))
        out = forgetting_attention(q, k, v, log_g, self.window)
        if return_state:
            for buffer in state:
                buffer.keep_last(self.window)
        return out, state

    def mix_shared(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        assert log_g is not None
        compare_calls(cp, "forgetting", return_state, q=q, k=k, v=v, log_g=log_g)
        state = None
        if return_state:
            first = 0 if self.window is None else max(0, cp.layout.tokens - self.window)
            kept = (k, v, log_g.to(v.dtype))
            state = GatedKeyValues(*(GrowingBuffer(gather_tokens(cp, x, first)) for x in kept))
        return forgetting_over_ranks(q, k, v, log_g, cp, self.window), state


class GatedKeyValues(NamedTuple):
    """Keys [B, S, G, K], values [B, S, G, V] and log gates [B, S, H] of the last S tokens, or of those in the window.

    Log gates are kept as they are, and not their sums: half precision would round a sum of thousands to whole numbers.
    """

    k: GrowingBuffer
    v: GrowingBuffer
    log_g: GrowingBuffer


def forgetting_over_ranks(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, cp: ContextParallel, window: int | None = None
) -> Tensor:
    """Compute forgetting attention of sequences that lie on several ranks, by the ways of `attention_over_ranks`.

    Log gates go with keys and values, in float32: a rank sums those that its queries meet.

    Args:
        q: [B, t, H, K], this rank's tokens.
        k: [B, t, G, K].
        v: [B, t, G, V].
        log_g: Natural logarithms of the forget gates [B, t, H], at most 0.
        cp: Which rank has which tokens.
        window: Keys that a query sees, its own included. None stands for all.

    Returns:
        Outputs [B, t, H, V] of this rank's tokens.
    """
    if by_halo(cp, window, q.shape[2], k.shape[2], k.shape[3], v.shape[3], log_g.shape[2]):
        (k, v), seen = pieces_after_halo(cp, window, k, v)
        (log_g,), gates = pieces_after_halo(cp, window, log_g)  # a halo has one dtype
        outs = [
            forgetting_attention(q[:, own], keys, values, log_gates, window)
            for (own, (keys, values)), (_, (log_gates,)) in zip(seen, gates, strict=True)
        ]
        return joined_outputs(outs, (q, k, v, log_g), (*q.shape[:3], v.shape[3]), v)
    k, v = heads_for_ranks(k, cp.ranks), heads_for_ranks(v, cp.ranks)
    q, k, v, log_g = (tokens_for_heads(x, cp) for x in (q, k, v, log_g[..., None]))
    own = [slice(*bounds) for bounds in pairwise(cp.layout.bounds)]
    outs = [forgetting_attention(q[:, at], k[:, at], v[:, at], log_g[:, at, :, 0], window) for at in own]
    out: Tensor = heads_for_tokens(torch.cat(outs, 1), cp)
    return out


def forgetting_attention(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, window: int | None = None) -> Tensor:
    """Compute softmax attention whose scores have log gates added: those of the tokens after the key, up to the query.

    Half precision on CUDA goes through flash-linear-attention where that is installed, if no tokens came before and
    there is no window.

    Args:
        q: [B, T, H, K], of the last T of the S tokens.
        k: [B, S, G, K].
        v: [B, S, G, V].
        log_g: Natural logarithms of the forget gates [B, S, H], at most 0.
        window: Keys that a query sees, its own included. None stands for all.

    Returns:
        Outputs [B, T, H, V].
    """
    (batch, tokens, heads, _), keys = q.shape, k.shape[1]
    past = keys - tokens
    if window is None and past == 0 and tokens <= MAX_FORGETTING_TOKENS and fla_supports(q, v):
        return forgetting_by_fla(q, k, v, log_g)
    sums = log_g.double().cumsum(1)
    outs = []
    for start, stop in pieces(tokens, batch * heads * min(keys, window or keys)):
        first = 0 if window is None else max(0, past + start + 1 - window)
        met = slice(first, past + stop)
        run = partial(_piece, earlier=past + start - first, window=window)
        outs.append(recomputed(run, q[:, start:stop], k[:, met], v[:, met], sums[:, met]))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _piece(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, earlier: int, window: int | None) -> Tensor:
    """Return the outputs [B, t, H, V] of t queries, whose first has `earlier` keys before its own.

    sums: [B, s, H], float64: sums of the log gates up to each key.
    """
    # Relative to the first query, sums are small where weights are not: float32 is enough for their differences.
    sums = (sums - sums[:, earlier : earlier + 1]).to(torch.promote_types(q.dtype, torch.float32)).mT
    bias = sums[:, :, earlier:, None] - sums[:, :, None]
    query = torch.arange(q.shape[1], device=q.device)[:, None] + earlier
    key = torch.arange(k.shape[1], device=q.device)
    unseen = key > query if window is None else (key > query) | (key <= query - window)
    bias = bias.masked_fill(unseen, -torch.inf).to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)
