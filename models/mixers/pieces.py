"""Attention over parts of its queries at a time, so that no tensor of all queries and keys is held.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_NUMBERS = 2**25
"""Numbers of a tensor of scores or of keys that were gathered, at most, but for a single query: 128 MiB in float32."""

MAX_QUERIES = 256
"""Queries of a piece, at most. A piece meets the keys up to its last query: longer ones meet more that are masked."""


def pieces(queries: int, numbers: int, longest: int | None = None) -> list[tuple[int, int]]:
    """Return start and stop of each piece of `queries` queries, of which each takes so many `numbers`.

    longest: queries of a piece at most. None stands for MAX_QUERIES.
    """
    size = max(1, min(longest or MAX_QUERIES, MAX_NUMBERS // max(1, numbers)))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def recomputed(run: Callable[..., Any], *tensors: Tensor) -> Any:
    """Return run(*tensors). Autograd keeps the tensors, and the backward pass runs it again."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)
    return run(*tensors)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute softmax attention by plain products, the softmax in float32.

    Args:
        q: [..., T, K].
        k: [..., S, K].
        v: [..., S, V].
        seen: Bool, broadcast to [..., T, S], true where a query sees a key.
        scale: What products of queries and keys are multiplied by.

    Returns:
        Outputs [..., T, V], 0 where a query sees no key, and the weights [..., T, S] in float32 or float64.
    """
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    # Where nothing is seen, the least number keeps NaN out of the softmax and of its gradient; -inf would not.
    least = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~seen, least).softmax(-1).masked_fill(~seen, 0)
    return weights.to(v.dtype) @ v, weights


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices [..., count] of the largest scores [..., n]; of equal ones the first.

    topk says nothing of equal scores: which ones it takes changes with n, so that a cache would change the output.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows [..., t, n, D] of x [..., S, D] at index [..., t, n]; x of any strides is read at these alone."""
    rows = index.flatten(-2)[..., None].expand(*index.shape[:-2], -1, x.shape[-1])
    return torch.unflatten(x.gather(-2, rows), -2, index.shape[-2:])
