"""DeepSeek sparse attention (DSA, report of DeepSeek-V3.2-Exp, section 2): MLA over the keys that an indexer picks.

Shapes: B batch, T queries, S keys, H heads, L latent dim (kv_lora_rank), n key features without positions, r key
features with RoPE, v value features; X indexer heads of x features, P picked keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from powerplan.kernels.distributed.gather import gather_tokens
from powerplan.kernels.distributed.stretches import joined_outputs
from powerplan.mixers import DSA
from powerplan.models.cache import GrowingBuffer
from powerplan.models.mixers.attention import pieces_after_halo
from powerplan.models.mixers.mla import LatentAttention
from powerplan.models.mixers.pieces import attend, gathered, largest, pieces, recomputed
from powerplan.models.mixers.ranks import compare_calls, rope_of_rank
from powerplan.models.rope import apply_rope, rope_cos_sin
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class Indexer(nn.Module):
    """Scores of keys for each query (equation 1): the sum of the heads' ReLU(q . k), each with a weight of its token.

    Its weights have no gradient from the model's loss, as indices have none. The report trains them by a loss of their
    own (section 2.1.1), which is not here.
    """

    def __init__(self, mixer: DSA, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.heads, self.head_dim = mixer.index_heads, mixer.index_head_dim
        self.rope_dim = min(mixer.qk_rope_head_dim, mixer.index_head_dim)
        queries = self.heads * self.head_dim
        self.q_proj = nn.Linear(mixer.q_lora_rank or hidden_size, queries, bias=False, **factory_kwargs)
        self.k_proj = nn.Linear(hidden_size, self.head_dim, bias=False, **factory_kwargs)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6, **factory_kwargs)
        self.head_weights = nn.Linear(hidden_size, self.heads, bias=False, **factory_kwargs)

    @torch.no_grad()
    def forward(
        self, x: Tensor, query_input: Tensor, cos_sin: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, X, x], keys [B, T, x] and weights [B, T, X] of x [B, T, m].

        query_input: latents [B, T, q] that the queries are made of. The first features are rotated, as many as MLA's,
        by the cosines and sines of their positions.
        """
        q = self.q_proj(query_input).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(x)).to(q.dtype)
        if cos_sin is not None:
            q, k = apply_rope(q, *cos_sin), apply_rope(k[:, :, None], *cos_sin)[:, :, 0]
        return q, k, self.head_weights(x) * (self.heads * self.head_dim) ** -0.5


class SparseLatentAttention(LatentAttention):
    """MLA over the `top_k` keys that the indexer picks for each token, in absorbed form. [B, T, m] -> [B, T, m]."""

    def __init__(self, mixer: DSA, hidden_size: int, *, rope: Rope | None, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, rope=rope, **factory_kwargs)
        self.top_k = mixer.top_k
        self.indexer = Indexer(mixer, hidden_size, **factory_kwargs)

    def run(self, x: Tensor, past_tokens: int, state: Any, *, return_state: bool) -> tuple[Tensor, Any]:
        def rotation(features: int, rope: Rope) -> tuple[Tensor, Tensor]:
            return rope_cos_sin(past_tokens, x.shape[1], features, x.device, rope)

        q, entries, (index_q, index_k, index_weights) = self.prepare(x, rotation)
        if state is not None:
            entries, index_k = state.entries.append(entries), state.index_keys.append(index_k)
        elif return_state:
            state = IndexedLatents(GrowingBuffer(entries), GrowingBuffer(index_k))
        return self.expanded(self.attend_picked(q, entries, (index_q, index_k, index_weights))), state

    def run_shared(self, x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Any]:
        """A query may pick any key before it: each rank gets all latents and indexer's keys before its fragments."""

        def rotation(features: int, rope: Rope) -> tuple[Tensor, Tensor]:
            return rope_of_rank(cp, features, x.device, rope)

        q, entries, (index_q, index_k, index_weights) = self.prepare(x, rotation)
        compare_calls(cp, "dsa", return_state, q=q, latents=entries, index_keys=index_k)
        state = None
        if return_state:
            state = IndexedLatents(*(GrowingBuffer(gather_tokens(cp, part)) for part in (entries, index_k)))
        (entries,), seen = pieces_after_halo(cp, None, entries)
        _, index_keys = pieces_after_halo(cp, None, index_k)  # no gradient goes back to them
        outs = [
            self.attend_picked(q[:, own], latents, (index_q[:, own], keys, index_weights[:, own]))
            for (own, (latents,)), (_, (keys,)) in zip(seen, index_keys, strict=True)
        ]
        return self.expanded(joined_outputs(outs, (q, entries), (*q.shape[:3], self.latent_dim), entries)), state

    def prepare(
        self, x: Tensor, rotation: Callable[[int, Rope], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the queries in absorbed form [B, T, H, L + r], the entries [B, T, L + r], and what the indexer makes.

        rotation: takes how many features are rotated, and returns cosines and sines of the positions of x [B, T, m].
        """
        rope, query_input = self.rope, self.query_input(x)
        cos_sin = None if rope is None else rotation(self.rope_dim, rope)
        q_nope, q_rope, entries = self.project(x, cos_sin, query_input)
        index = self.indexer(x, query_input, None if rope is None else rotation(self.indexer.rope_dim, rope))
        k_weight, _ = self.expansions()
        return torch.cat((torch.einsum("bthn,hnl->bthl", q_nope, k_weight), q_rope), -1), entries, index

    def attend_picked(self, q: Tensor, entries: Tensor, index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the sums of latents [B, T, H, L] that `sparse_latents` does of its arguments."""
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        return sparse_latents(q, entries, self.latent_dim, index, self.top_k, scale)

    def expanded(self, summed: Tensor) -> Tensor:
        """Return sums of latents [B, T, H, L] as values of the heads, back in the hidden size."""
        _, v_weight = self.expansions()
        result: Tensor = self.o_proj(torch.einsum("bthl,hvl->bthv", summed, v_weight).flatten(-2))
        return result


class IndexedLatents(NamedTuple):
    """Latents and RoPE features [B, S, L + r] of all tokens, and the keys [B, S, x] of the indexer."""

    entries: GrowingBuffer
    index_keys: GrowingBuffer


def sparse_latents(
    q: Tensor, entries: Tensor, latent_dim: int, index: tuple[Tensor, Tensor, Tensor], top_k: int, scale: float
) -> Tensor:
    """Compute attention of all heads to the entries that the indexer scores best.

    Where there are no more entries than that, nothing is scored.

    Args:
        q: Queries in absorbed form [B, T, H, L + r], of the last T of the S tokens.
        entries: [B, S, L + r].
        latent_dim: L.
        index: Queries [B, T, X, x] and keys [B, S, x] of the indexer, and the weights [B, T, X] of its heads.
        top_k: Entries that a query attends to.
        scale: What products of queries and entries are multiplied by.

    Returns:
        Sums of latents [B, T, H, L].
    """
    (batch, tokens, heads, width), keys = q.shape, entries.shape[1]
    index_q, index_k, index_weights = index
    past, met = keys - tokens, min(top_k, keys)
    numbers = max(index_q.shape[2] * keys, met * max(width, heads))
    outs = []
    for start, stop in pieces(tokens, batch * numbers):
        first, end, own = past + start, past + stop, slice(start, stop)
        picked = None
        if end > top_k:
            picked = picks(index_q[:, own], index_k[:, :end], index_weights[:, own], first, top_k)
        run = partial(_piece, picked=picked, first=first, latent_dim=latent_dim, scale=scale)
        outs.append(recomputed(run, q[:, own], entries[:, :end]))
    return torch.cat(outs, 1)


@torch.no_grad()
def picks(q: Tensor, k: Tensor, weights: Tensor, first: int, top_k: int) -> Tensor:
    """Return the keys [B, t, min(top_k, s)] that are picked for t queries, the first of them at the position `first`.

    q: [B, t, X, x]. k: [B, s, x]. weights: [B, t, X]. Where a query has fewer keys, keys after it come last.
    """
    products = torch.unflatten(q.flatten(1, 2) @ k.mT, 1, q.shape[1:3])
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (products.to(dtype).relu() * weights.to(dtype)[..., None]).sum(2)
    positions = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
    later = torch.arange(k.shape[1], device=q.device) > positions
    return largest(scores.masked_fill(later, -torch.inf), top_k)


def _piece(q: Tensor, entries: Tensor, picked: Tensor | None, first: int, latent_dim: int, scale: float) -> Tensor:
    """Return sums of latents [B, t, H, L] for queries [B, t, H, L + r] over `picked` [B, t, P] of the entries, or all.

    first: the position of the first query.
    """
    positions = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
    if picked is None:
        seen = (torch.arange(entries.shape[1], device=q.device) <= positions).repeat_interleave(q.shape[2], 0)
        out, _ = attend(q.flatten(1, 2), entries, entries[..., :latent_dim], seen, scale)
        return torch.unflatten(out, 1, q.shape[1:3])
    keys = gathered(entries, picked)
    return attend(q, keys, keys[..., :latent_dim], (picked <= positions)[..., None, :], scale)[0]
