"""Softmax attention by torch's SDPA, over the whole context or over a sliding window at linear cost.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.kernels.distributed.gather import gather_tokens
from powerplan.kernels.distributed.halo import tokens_before
from powerplan.kernels.distributed.stretches import joined_outputs
from powerplan.mixers import Attention
from powerplan.models.cache import GrowingBuffer
from powerplan.models.mixers.heads import GroupedHeadsMixer
from powerplan.models.mixers.ranks import (
    can_share,
    compare_calls,
    heads_for_ranks,
    heads_for_tokens,
    swapped_numbers,
    tokens_for_heads,
)
from powerplan.models.mixers.sinks import rescale_for_sinks, sdpa_with_sinks
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


QUERIES_PER_MASK = 1024
"""Queries that meet the keys of a cache, or of other ranks, at once. Each needs a mask of all keys: at 64k keys the
masks of 1,024 take 64 MB."""


class SoftmaxAttention(GroupedHeadsMixer):
    """Causal softmax attention with grouped heads. With a window a query sees that many keys, its own included."""

    def __init__(self, mixer: Attention, hidden_size: int, *, rope: Rope | None, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, rope=rope, **factory_kwargs)
        self.window = mixer.window
        self.sinks = nn.Parameter(torch.zeros(mixer.heads, **factory_kwargs)) if mixer.sinks else None

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Set the sinks to 0: as much weight as a key whose product with the query is 0."""
        if self.sinks is not None:
            self.sinks.zero_()

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        if state is not None:
            k, v = state.k.append(k), state.v.append(v)
        elif return_state:
            state = KeyValues(GrowingBuffer(k), GrowingBuffer(v))
        out = softmax_attention(q, k, v, self.window, self.sinks)
        if return_state:
            state.k.keep_last(self.window)
            state.v.keep_last(self.window)
        return out, state

    def mix_shared(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        compare_calls(cp, "attention", return_state, q=q, k=k, v=v)
        state = None
        if return_state:
            tokens = cp.layout.tokens
            first = 0 if self.window is None else max(0, tokens - self.window)
            state = KeyValues(*(GrowingBuffer(gather_tokens(cp, x, first)) for x in (k, v)))
        return attention_over_ranks(q, k, v, cp, self.window, self.sinks), state


class KeyValues(NamedTuple):
    """Keys [B, S, G, K] and values [B, S, G, V] of the last S tokens: all of them, or those in the window."""

    k: GrowingBuffer
    v: GrowingBuffer


def attention_over_ranks(
    q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, window: int | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Compute causal softmax attention of sequences that lie on several ranks.

    With a window, a rank needs the last window - 1 keys and values before its fragments. Without one, and where windows
    are so long that it takes fewer bytes, ranks swap tokens for heads (ranks.py). Heads that ranks cannot share need
    all keys and values before a fragment.

    Args:
        q: [B, t, H, K], this rank's tokens.
        k: [B, t, G, K].
        v: [B, t, G, V].
        cp: Which rank has which tokens.
        window: Keys that a query sees, its own included. None stands for all.
        sinks: Logits [H], or None.

    Returns:
        Outputs [B, t, H, V] of this rank's tokens.
    """
    if by_halo(cp, window, q.shape[2], k.shape[2], k.shape[3], v.shape[3]):
        return _after_halo(q, k, v, cp, window, sinks)
    k, v = heads_for_ranks(k, cp.ranks), heads_for_ranks(v, cp.ranks)
    own_sinks = None if sinks is None else sinks.chunk(cp.ranks)[cp.rank]
    q, k, v = (tokens_for_heads(x, cp) for x in (q, k, v))
    out: Tensor = heads_for_tokens(by_sequence(q, k, v, cp, window, own_sinks), cp)
    return out


def by_halo(
    cp: ContextParallel,
    window: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    gates: int = 0,
) -> bool:
    """Return whether ranks send the keys and values before their fragments, and not tokens for heads: where they cannot
    share the heads, and with a window where all of them together send fewer numbers that way.

    Without a window that could be fewer, too. But the work of a rank would grow with the tokens before it. `gates` are
    further numbers of a token that go with keys and values, in both ways.
    """
    if not can_share(heads, kv_heads, cp.ranks):
        return True
    if window is None:
        return False
    halo = cp.halo(window - 1).all_tokens * (kv_heads * (head_dim + v_head_dim) + gates)
    return halo <= swapped_numbers(cp, heads, kv_heads, head_dim, v_head_dim, gates)


def by_sequence(
    q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, window: int | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Return the attention of all tokens, [B, T, H, V], in which no sequence of the plan sees another one."""
    own = [slice(*bounds) for bounds in pairwise(cp.layout.bounds)]
    # Packed sequences have lengths of their own in every batch.
    settings: dict[str, Any] = {"window": window, "sinks": sinks, "compiled": not cp.packed}
    parts = [softmax_attention(q[:, at], k[:, at], v[:, at], **settings) for at in own]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _after_halo(
    q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, window: int | None, sinks: Tensor | None
) -> Tensor:
    """Return the attention of this rank's tokens [B, t, H, V] to their keys and to those before their fragments."""
    (k, v), pieces = pieces_after_halo(cp, window, k, v)
    parts = [
        softmax_attention(q[:, own], keys, values, window, sinks, compiled=not cp.packed)
        for own, (keys, values) in pieces
    ]
    return joined_outputs(parts, (q, k, v, sinks), (*q.shape[:3], v.shape[3]), v)


def pieces_after_halo(
    cp: ContextParallel, window: int | None, *tensors: Tensor
) -> tuple[list[Tensor], list[tuple[slice, list[Tensor]]]]:
    """Return what the tokens of this rank see of tensors [B, t, ...] that lie on several ranks.

    First the tensors again, by which the backward pass of a rank without tokens finds the exchange. Then, for each
    piece of a sequence that this rank has: where it lies among the rank's tokens, and the tokens that it sees, its own
    behind the last window - 1 before it, or all of them without a window.
    """
    halo, own, before = tokens_before(cp, (window or cp.layout.longest_sequence) - 1, *tensors)
    pieces = []
    for fragment, *past in zip(cp.fragments, *(torch.split(x, halo.lengths, 1) for x in before), strict=True):
        for piece in fragment.pieces:
            at = fragment.local(piece)
            seen = [
                x[:, at] if piece.begins else torch.cat((earlier, x[:, at]), 1)
                for x, earlier in zip(own, past, strict=True)
            ]
            pieces.append((at, seen))
    return own, pieces


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
    *,
    compiled: bool = True,
) -> Tensor:
    """Compute causal softmax attention of the last T of S tokens.

    A window shorter than the queries costs T times its length, not T^2: in blocks through SDPA on a CPU, through a
    compiled FlexAttention with a block mask on a GPU.

    Args:
        q: [B, T, H, K].
        k: [B, S, G, K].
        v: [B, S, G, V].
        window: Keys that a query sees, its own included. None stands for all.
        sinks: One logit per query head [H], which joins each softmax without a value. None stands for none.
        compiled: Whether a GPU may use FlexAttention, which torch compiles for each T and S, 8 of them at most. Without
            it uses SDPA, too, which holds all T x S weights where there are sinks and no window.

    Returns:
        Outputs [B, T, H, V].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tokens = q.shape[2]
    # The earliest key that the first query sees.
    first = 0 if window is None else max(0, k.shape[2] - tokens + 1 - window)
    k, v = k[:, :, first:], v[:, :, first:]
    past_tokens = k.shape[2] - tokens
    is_long = window is not None and tokens > window
    if compiled and q.device.type == "cuda" and (is_long or (sinks is not None and not past_tokens)):
        out = _flex_attention(q, k, v, min(window or tokens, tokens), sinks)
    elif window is not None and tokens > window:
        out = windowed(q, k, v, window, sinks)
    elif past_tokens:
        out = _after_cache(q, k, v, window, sinks)
    else:
        out = sdpa_with_sinks(q, k, v, sinks, causal=True)
    return out.transpose(1, 2)


def windowed(q: Tensor, k: Tensor, v: Tensor, width: int, sinks: Tensor | None = None) -> Tensor:
    """Sliding window by SDPA: a block of `width` queries meets its own block of keys and the one before, masked.

    q [B, H, T, K], k [B, G, S, K], v [B, G, S, V], sinks [H] -> [B, H, T, V], for the last T of S < T + width tokens.
    """
    batch, heads, tokens, _ = q.shape
    past = k.shape[2] - tokens
    seen = k[:, :, : past + width], v[:, :, : past + width]
    if past:
        mask = _mask_after_cache(min(tokens, width), past, width, q.device)
        first = sdpa_with_sinks(q[:, :, :width], *seen, sinks, mask=mask)
    else:
        first = sdpa_with_sinks(q[:, :, :width], *seen, sinks, causal=True)
    if tokens <= width:
        return first
    k, v = k[:, :, past:], v[:, :, past:]
    count = -(-tokens // width)
    pad = count * width - tokens

    def blocks(x: Tensor) -> Tensor:
        """[B, heads, T, d] -> [B, blocks, heads, width, d]."""
        return F.pad(x, (0, 0, 0, pad)).view(batch, x.shape[1], count, width, x.shape[3]).transpose(1, 2)

    def block_pairs(x: Tensor) -> Tensor:
        """[B, heads, T, d] -> [B (blocks - 1), heads, 2 width, d]: each block but the first, behind the one before."""
        x = blocks(x)
        return torch.cat((x[:, :-1], x[:, 1:]), 3).flatten(0, 1)

    mask = _two_block_mask(width, q.device)
    rest = sdpa_with_sinks(blocks(q)[:, 1:].flatten(0, 1), block_pairs(k), block_pairs(v), sinks, mask=mask)
    rest = rest.view(batch, count - 1, heads, width, v.shape[3]).transpose(1, 2).reshape(batch, heads, -1, v.shape[3])
    return torch.cat((first, rest[:, :, : tokens - width]), 2)


def _after_cache(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Return the attention [B, H, T, V] of the last T of S tokens, QUERIES_PER_MASK of them at a time."""
    tokens, past = q.shape[2], k.shape[2] - q.shape[2]
    if tokens == 1:
        return sdpa_with_sinks(q, k, v, sinks)
    outs = []
    for first in range(0, tokens, QUERIES_PER_MASK):
        own = q[:, :, first : first + QUERIES_PER_MASK]
        seen = past + first + own.shape[2]
        mask = _mask_after_cache(own.shape[2], past + first, window, q.device)
        outs.append(sdpa_with_sinks(own, k[:, :, :seen], v[:, :, :seen], sinks, mask=mask))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _mask_after_cache(tokens: int, past_tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Return the causal mask [T, past_tokens + T] of T queries that follow `past_tokens` keys: true is seen."""
    mask = torch.ones(tokens, past_tokens + tokens, dtype=torch.bool, device=device).tril(past_tokens)
    return mask if window is None else mask.triu(past_tokens + 1 - window)


def _two_block_mask(width: int, device: torch.device) -> Tensor:
    """Return the mask [width, 2 width] of the queries of a block over its keys and those of the block before."""
    query = torch.arange(width, device=device)[:, None] + width
    key = torch.arange(2 * width, device=device)[None]
    return (key <= query) & (key > query - width)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, width: int, sinks: Tensor | None) -> Tensor:
    """Sliding window by FlexAttention, which also gives the log-sum-exp of the scores. A `width` of T is causal."""
    mask = _sliding_block_mask(q.shape[2], k.shape[2], width, str(q.device))
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": q.shape[1] != k.shape[1]}
    if sinks is None:
        out: Tensor = _compiled_flex_attention()(q, k, v, **options)
        return out
    out, lse = _compiled_flex_attention()(q, k, v, **lse_argument(), **options)
    return rescale_for_sinks(out, getattr(lse, "lse", lse), sinks)


def lse_argument() -> dict[str, Any]:
    """Return the argument that asks FlexAttention for the log-sum-exp; torch 2.9 has given it another name."""
    from torch.nn.attention import flex_attention

    request = getattr(flex_attention, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def _sliding_block_mask(tokens: int, keys: int, width: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    past = keys - tokens

    def sliding(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query + past >= key) & (query + past - key < width)

    # _compile makes the mask block by block. The eager form holds all T^2 entries. torch has no public argument for it.
    return create_block_mask(sliding, None, None, tokens, keys, device=device, _compile=keys > 8192)
