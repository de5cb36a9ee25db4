"""Mixture of block attention (MoBA, Lu et al. 2025, arXiv 2502.13189, section 2.2).

A query scores the mean key of each earlier block, and attends to the best of them and to its own block so far. For each
block, the queries that picked it are gathered, and meet all of its keys in one product.

Shapes: B batch, T queries, S keys, n blocks, H query heads, G key/value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from powerplan.kernels.distributed.gather import gather_tokens
from powerplan.kernels.distributed.stretches import joined_outputs
from powerplan.mixers import MoBA
from powerplan.models.cache import GrowingBuffer
from powerplan.models.mixers.attention import pieces_after_halo
from powerplan.models.mixers.heads import GroupedHeadsMixer
from powerplan.models.mixers.pieces import largest, pieces, recomputed
from powerplan.models.mixers.ranks import compare_calls
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class MixtureOfBlocks(GroupedHeadsMixer):
    """Softmax attention to the `top_k` blocks that a query head picks, its own among them. [B, T, m] -> [B, T, m]."""

    def __init__(self, mixer: MoBA, hidden_size: int, *, rope: Rope | None, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, rope=rope, **factory_kwargs)
        self.block_size, self.top_k = mixer.block_size, mixer.top_k
        self.output_norm = nn.RMSNorm(mixer.v_head_dim, eps=1e-6, **factory_kwargs) if mixer.output_norm else None

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        if state is not None:
            k, v = state.k.append(k), state.v.append(v)
            known = state.means.entries.shape[1] * self.block_size
            means = state.means.append(block_means(k[:, known:], self.block_size))
        else:
            means = block_means(k, self.block_size)
            if return_state:
                state = BlockState(GrowingBuffer(k), GrowingBuffer(v), GrowingBuffer(means))
        return block_attention(q, k, v, means, self.block_size, self.top_k), state

    def mix_shared(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        """A query may pick any block before it: each rank gets all keys and values before its fragments."""
        compare_calls(cp, "moba", return_state, q=q, k=k, v=v)
        state = None
        if return_state:
            keys, values = (gather_tokens(cp, x) for x in (k, v))
            state = BlockState(*map(GrowingBuffer, (keys, values, block_means(keys, self.block_size))))
        (k, v), seen = pieces_after_halo(cp, None, k, v)
        outs = []
        for own, (keys, values) in seen:
            means = block_means(keys, self.block_size)
            outs.append(block_attention(q[:, own], keys, values, means, self.block_size, self.top_k))
        return joined_outputs(outs, (q, k, v), (*q.shape[:3], v.shape[3]), v), state

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        return super().merge(x, out if self.output_norm is None else self.output_norm(out))


class BlockState(NamedTuple):
    """Keys [B, S, G, K] and values [B, S, G, V] of all tokens, and the mean keys [B, n, G, K] of all whole blocks."""

    k: GrowingBuffer
    v: GrowingBuffer
    means: GrowingBuffer


def block_means(k: Tensor, block_size: int) -> Tensor:
    """Return the mean keys [B, n, G, K] of the whole blocks of k [B, S, G, K]."""
    whole = k.shape[1] // block_size * block_size
    return torch.unflatten(k[:, :whole], 1, (-1, block_size)).mean(2)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def block_attention(q: Tensor, k: Tensor, v: Tensor, means: Tensor, block_size: int, top_k: int) -> Tensor:
    """Compute softmax attention over a query's own block so far and the `top_k` - 1 earlier blocks that it scores best.

    How many queries picked a block is read from the device: it runs outside of the graphs of torch.compile.

    Args:
        q: [B, T, H, K], of the last T of the S tokens.
        k: [B, S, G, K].
        v: [B, S, G, V].
        means: [B, n, G, K], the mean keys of all whole blocks.
        block_size: Tokens of a block.
        top_k: Blocks that a query attends to, its own among them.

    Returns:
        Outputs [B, T, H, V].
    """
    own, own_lse = _own_blocks(q, k, v, block_size)
    earlier = means[:, : (k.shape[1] - 1) // block_size]
    if not earlier.shape[1]:
        return own
    rows, outs, lses = _picked_blocks(q, k, v, picks(q, earlier, k.shape[1], block_size, top_k), block_size)
    # Each output is of a softmax of its own. The log-sum-exps say what share it has of the softmax over all keys.
    own, own_lse = own.flatten(0, 2), own_lse.flatten()
    top = own_lse.detach().scatter_reduce(0, rows, lses.detach(), "amax")
    own_weight, weights = (own_lse - top).exp(), (lses - top[rows]).exp()
    total = own_weight.index_add(0, rows, weights)
    summed = (own * own_weight[:, None]).index_add(0, rows, outs * weights[:, None])
    return (summed / total[:, None]).to(v.dtype).view(*q.shape[:3], v.shape[3])


@torch.no_grad()
def picks(q: Tensor, means: Tensor, keys: int, block_size: int, top_k: int) -> Tensor:
    """Return the blocks [B, T, H, C] that each query head picks besides its own, and -1 where it has fewer of them.

    means: [B, n, G, K], the mean keys of all blocks before that of the last of the `keys` tokens. C: min(top_k - 1, n).
    """
    batch, tokens, heads, _ = q.shape
    blocks, kv_heads = means.shape[1:3]
    own_blocks = (torch.arange(tokens, device=q.device) + keys - tokens)[:, None, None, None] // block_size
    found = []
    for start, stop in pieces(tokens, batch * heads * blocks):
        grouped = torch.unflatten(q[:, start:stop], 2, (kv_heads, -1))
        scores = torch.einsum("btgrk,bngk->btgrn", grouped, means).float()
        own = own_blocks[start:stop]
        unseen = torch.arange(blocks, device=q.device) >= own
        best = largest(scores.masked_fill(unseen, -torch.inf), top_k - 1)
        found.append(best.masked_fill(best >= own, -1).flatten(2, 3))
    return torch.cat(found, 1)


def _own_blocks(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the outputs [B, T, H, V] of the queries over their own blocks so far, and the log-sum-exps [B, T, H]."""
    keys, past = k.shape[1], k.shape[1] - q.shape[1]
    outs, lses = [], []
    for block in range(past // block_size, (keys - 1) // block_size + 1):
        first = block * block_size
        begin, end = max(first, past), min(first + block_size, keys)
        for start, stop in pieces(end - begin, q.shape[0] * q.shape[2] * block_size):
            met, run = slice(first, begin + stop), partial(_own_block, earlier=begin + start - first)
            out, lse = recomputed(run, q[:, begin + start - past : begin + stop - past], k[:, met], v[:, met])
            outs.append(out)
            lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _own_block(q: Tensor, k: Tensor, v: Tensor, earlier: int) -> tuple[Tensor, Tensor]:
    """Return outputs [B, t, H, V] and log-sum-exps [B, t, H] of queries of a block over its keys so far.

    earlier: keys of the block before that of the first query.
    """
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(earlier)
    grouped = torch.unflatten(q, 2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
    out, lse = _attend(grouped, k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None], seen)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2)


def _picked_blocks(q: Tensor, k: Tensor, v: Tensor, picked: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what queries find in the blocks that they picked, block after block, for P picks.

    picked: blocks [B, T, H, C], -1 for none. Returned are the rows [P] of the queries in q.flatten(0, 2), the outputs
    [P, V] and the log-sum-exps [P].
    """
    batch, tokens, _, count = picked.shape
    kv_heads, blocks = k.shape[2], k.shape[1] // block_size
    groups = torch.arange(batch, device=q.device)[:, None] * kv_heads + torch.arange(kv_heads, device=q.device)
    by_group = picked.view(batch, tokens, kv_heads, -1)
    none = batch * kv_heads * blocks
    block = (groups[:, None, :, None] * blocks + by_group).masked_fill(by_group < 0, none).flatten()
    counts = torch.bincount(block, minlength=none + 1)[:none].tolist()
    rows = block.argsort(stable=True)[: sum(counts)] // max(1, count)
    keys, values = (_views_of_blocks(x[:, : blocks * block_size], blocks) for x in (k, v))
    outs, lses = [], []
    for index, queries in enumerate(torch.split(q.flatten(0, 2).index_select(0, rows), counts)):
        for start, stop in pieces(len(queries), block_size, longest=len(queries)):
            out, lse = recomputed(_attend, queries[start:stop], keys[index], values[index])
            outs.append(out)
            lses.append(lse)
    if outs:
        return rows, torch.cat(outs), torch.cat(lses)
    return rows, v.new_empty(0, v.shape[3]), q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))


def _views_of_blocks(x: Tensor, blocks: int) -> list[Tensor]:
    """Return views [block_size, D] of the whole blocks of x [B, S, G, D], in the order of sequences, heads and blocks.

    Blocks that nobody picked are not read. The gradient of unbind puts all of them together at once; that of a slice
    would have the size of x for each.
    """
    by_head = torch.unflatten(x, 1, (blocks, -1)).permute(0, 3, 1, 2, 4)
    return [block for row in by_head.unbind() for head in row.unbind() for block in head.unbind()]


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return outputs [..., t, V] and log-sum-exps [..., t] of queries [..., t, K] over keys [..., s, K]."""
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse
