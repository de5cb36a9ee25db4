"""Native sparse attention (NSA, Yuan et al. 2025, arXiv 2502.11089, section 3).

Three branches share queries, keys and values, and a gate weights each: attention to the means of blocks, attention to
the blocks that these scores pick, and attention to a window. The heads of a group pick together, so that the keys and
values that a query picked are gathered once for all of them.

Shapes: B batch, T queries, S keys, n compressed blocks, H query heads, G key/value heads, R = H / G, K key head dim, V
value head dim.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from powerplan.kernels.distributed.gather import gather_tokens
from powerplan.kernels.distributed.stretches import joined_outputs
from powerplan.mixers import NSA
from powerplan.models.cache import GrowingBuffer
from powerplan.models.mixers.attention import pieces_after_halo, softmax_attention
from powerplan.models.mixers.heads import GroupedHeadsMixer
from powerplan.models.mixers.pieces import attend, gathered, largest, pieces, recomputed
from powerplan.models.mixers.ranks import compare_calls
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel

FIRST, BEFORE = 2e30, 1e30
"""Scores of the first block and of the one before a query's own: above all sums of weights, below the own block's."""


class NativeSparseAttention(GroupedHeadsMixer):
    """Gated sum of attention to compressed blocks, to picked blocks and to a window. [B, T, m] -> [B, T, m]."""

    def __init__(self, mixer: NSA, hidden_size: int, *, rope: Rope | None, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, rope=rope, **factory_kwargs)
        self.settings = mixer
        self.branch_gates = nn.Linear(hidden_size, 3 * mixer.heads, bias=False, **factory_kwargs)

    def run(self, x: Tensor, past_tokens: int, state: Any, *, return_state: bool) -> tuple[Tensor, Any]:
        q, k, v, _ = self.project(x, past_tokens)
        size, stride = self.settings.compress_size, self.settings.compress_stride
        if state is None:
            means = self.means_of(k, v)
            if return_state:
                state = SparseState(*map(GrowingBuffer, (k, v, *means)))
        else:
            k, v, known = state.k.append(k), state.v.append(v), state.k_means.entries.shape[1] * stride
            means = (
                state.k_means.append(block_means(k[:, known:], size, stride)),
                state.v_means.append(block_means(v[:, known:], size, stride)),
            )
        return self.merge(x, self.weighted(x, *self.branches(q, k, v, means))), state

    def run_shared(self, x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Any]:
        """A query may pick any block before it: each rank gets all keys and values before its fragments."""
        q, k, v, _ = self.project_shared(x, cp)
        compare_calls(cp, "nsa", return_state, q=q, k=k, v=v)
        state = None
        if return_state:
            keys, values = (gather_tokens(cp, part) for part in (k, v))
            state = SparseState(*map(GrowingBuffer, (keys, values, *self.means_of(keys, values))))
        (k, v), seen = pieces_after_halo(cp, None, k, v)
        outs = [
            torch.stack(self.branches(q[:, own], keys, values, self.means_of(keys, values), packed=cp.packed), 3)
            for own, (keys, values) in seen
        ]
        out = joined_outputs(outs, (q, k, v), (*q.shape[:3], 3, v.shape[3]), v)
        return self.merge(x, self.weighted(x, *out.unbind(3))), state

    def means_of(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means of keys and of values over compressed blocks."""
        size, stride = self.settings.compress_size, self.settings.compress_stride
        return block_means(k, size, stride), block_means(v, size, stride)

    def branches(
        self, q: Tensor, k: Tensor, v: Tensor, means: tuple[Tensor, Tensor], *, packed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs [B, T, H, V] of all three branches.

        packed: whether sequences have lengths of their own in every batch.
        """
        window = softmax_attention(q, k, v, self.settings.window, compiled=not packed)
        return *sparse_attention(q, k, v, means, self.settings), window

    def weighted(self, x: Tensor, compressed: Tensor, picked: Tensor, window: Tensor) -> Tensor:
        """Return the sum of the branches, each weighted by its gate."""
        gates = torch.unflatten(self.branch_gates(x).sigmoid(), -1, (self.heads, 3))
        return gates[..., :1] * compressed + gates[..., 1:2] * picked + gates[..., 2:] * window


class SparseState(NamedTuple):
    """Keys [B, S, G, K] and values [B, S, G, V] of all tokens; their means over whole blocks [B, n, G, K or V]."""

    k: GrowingBuffer
    v: GrowingBuffer
    k_means: GrowingBuffer
    v_means: GrowingBuffer


def block_means(x: Tensor, size: int, stride: int) -> Tensor:
    """Return the means [B, n, G, D] of the whole blocks of `size` tokens of x [B, S, G, D], one every `stride`."""
    return x.unfold(1, size, stride).mean(-1) if x.shape[1] >= size else x[:, :0]


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, means: tuple[Tensor, Tensor], settings: NSA
) -> tuple[Tensor, Tensor]:
    """Compute the attention to compressed blocks, and that to the blocks which it picks.

    A query sees the compressed blocks that end with it or before it. The score of a block to pick is the sum of the
    weights of compressed blocks, times the tokens that both have in common, over all heads of a group: equations 9 and
    10 but for a factor, and for sizes that are no multiples of the stride too. A query's own block, the first one and
    the one before its own are picked before all others, in this order (section 4.1).

    Args:
        q: [B, T, H, K], of the last T of the S tokens.
        k: [B, S, G, K].
        v: [B, S, G, V].
        means: Means of keys [B, n, G, K] and of values [B, n, G, V] over compressed blocks.
        settings: Sizes of blocks, and how many are picked.

    Returns:
        Outputs of both branches, [B, T, H, V] each. The first is 0 where a query sees no compressed block.
    """
    (batch, tokens, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
    past, block, count = keys - tokens, settings.select_size, settings.select_count
    q = torch.unflatten(q, 2, (kv_heads, -1)).transpose(1, 2)
    k, v, k_means, v_means = (x.transpose(1, 2) for x in (k, v, *means))
    met = min(keys, count * block)
    numbers = max(heads * max(k_means.shape[2], met), kv_heads * met * (k.shape[-1] + v.shape[-1]))
    compressed, picked = [], []
    for start, stop in pieces(tokens, batch * numbers):
        own, first, end = q[:, :, start:stop], past + start, past + stop
        seen = max(0, (end - settings.compress_size) // settings.compress_stride + 1)
        run = partial(_compressed, first=first, settings=settings)
        out, scores = recomputed(run, own, k_means[:, :, :seen], v_means[:, :, :seen])
        compressed.append(out)
        if end <= count * block:
            picked.append(recomputed(partial(_all, first=first), own, k[:, :, :end], v[:, :, :end]))
        else:
            index = largest(scores, count)
            picked.append(recomputed(partial(_picked, index=index, first=first, block=block), own, k, v))
    first_out, second_out = (torch.cat(parts, 2).transpose(1, 2).flatten(2, 3) for parts in (compressed, picked))
    return first_out, second_out


def _compressed(q: Tensor, k: Tensor, v: Tensor, first: int, settings: NSA) -> tuple[Tensor, Tensor]:
    """Return the outputs [B, G, t, R, V] over compressed blocks, and the scores [B, G, t, m] of all blocks to pick.

    q: [B, G, t, R, K], the first query at the position `first`. k: [B, G, n, K]. v: [B, G, n, V].
    """
    positions = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    starts = torch.arange(k.shape[2], device=q.device) * settings.compress_stride
    out, weights = _attend(q, k, v, starts + settings.compress_size <= positions + 1)
    with torch.no_grad():
        blocks = torch.arange(-(-(first + q.shape[2]) // settings.select_size), device=q.device)
        scores = _shared(weights.sum(3), len(blocks), settings)
        own = positions // settings.select_size
        for fixed, score in ((blocks == own - 1, BEFORE), (blocks == 0, FIRST), (blocks == own, torch.inf)):
            scores = scores.masked_fill(fixed, score)
        return out, scores.masked_fill(blocks > own, -torch.inf)


def _shared(weights: Tensor, blocks: int, settings: NSA) -> Tensor:
    """Return the scores [..., m] of `blocks` blocks: weights [..., n] of compressed ones, each times the tokens that it
    shares with the block."""
    size, stride, block = settings.compress_size, settings.compress_stride, settings.select_size
    if not weights.shape[-1]:
        return weights.new_zeros(*weights.shape[:-1], blocks)
    starts = torch.arange(blocks, device=weights.device)[:, None] * block
    # The first that shares a token ends after the block's start; as many follow as begin before its end.
    nearby = (starts - size) // stride + 1 + torch.arange((block + size - 2) // stride + 1, device=weights.device)
    tokens = torch.minimum(starts + block, nearby * stride + size) - torch.maximum(starts, nearby * stride)
    tokens = tokens.clamp(min=0).masked_fill((nearby < 0) | (nearby >= weights.shape[-1]), 0)
    found = weights[..., nearby.clamp(0, weights.shape[-1] - 1)]
    return (found * tokens).sum(-1)


def _all(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """Return the outputs [B, G, t, R, V] over all keys so far, where there are no more blocks than are picked."""
    positions = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    return _attend(q, k, v, torch.arange(k.shape[2], device=q.device) <= positions)[0]


def _picked(q: Tensor, k: Tensor, v: Tensor, index: Tensor, first: int, block: int) -> Tensor:
    """Return the outputs [B, G, t, R, V] over the keys up to each query in the blocks `index` [B, G, t, count]."""
    keys = (index[..., None] * block + torch.arange(block, device=q.device)).flatten(-2)
    positions = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    within = keys.clamp(max=k.shape[2] - 1)
    seen = (keys <= positions)[..., None, :]
    return attend(q, gathered(k, within), gathered(v, within), seen, q.shape[-1] ** -0.5)[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs [B, G, t, R, V] and weights [B, G, t, R, s] over keys that all t queries meet; seen: [t, s]."""
    results = attend(q.flatten(2, 3), k, v, seen.repeat_interleave(q.shape[3], 0), q.shape[-1] ** -0.5)
    out, weights = (torch.unflatten(x, 2, q.shape[2:4]) for x in results)
    return out, weights
