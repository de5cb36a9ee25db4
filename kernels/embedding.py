"""The symmetric power embedding: phi(q).phi(k) = (q.k)^p (arXiv 2507.04239, Table 3 for its dimension)."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement
from math import factorial, sqrt

import torch
from torch import Tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multisets(d: int, p: int) -> tuple[Tensor, Tensor]:
    """Return the multisets of p indices below d in lexicographic order, [D, p], and sqrt of their multinomials, [D]."""
    return _multisets(d, p)


@lru_cache(maxsize=32)
def _multisets(d: int, p: int) -> tuple[Tensor, Tensor]:
    rows = list(combinations_with_replacement(range(d), p))
    weights = []
    for row in rows:
        orders = factorial(p)
        for index in set(row):
            orders //= factorial(row.count(index))
        weights.append(sqrt(orders))
    return torch.tensor(rows, dtype=torch.long).reshape(-1, p), torch.tensor(weights, dtype=torch.float64)


def spow(x: Tensor, p: int) -> Tensor:
    """Return phi(x), [..., d] -> [..., D] with D = C(d+p-1, p), in the dtype and on the device of `x`.

    Entry m, a multiset of p indices in lexicographic order, is sqrt(multinomial(m)) times the product of its features.
    """
    indices, weights = multisets(x.shape[-1], p)
    out: Tensor = weights.to(device=x.device, dtype=x.dtype).expand(*x.shape[:-1], -1)
    for column in indices.to(x.device).unbind(1):
        out = out * x[..., column]
    return out


def tiled_spow(x: Tensor, p: int, tile: int = 8) -> Tensor:
    """Return the tiled power embedding, [..., d] -> [..., C(n+p-1, p) tile^p] with n = ceil(d / tile).

    For every multiset of p tiles in lexicographic order, all products of one feature from each, times sqrt of the
    number of its orderings: phi(q).phi(k) = (q.k)^p, in fewer and larger pieces than `spow`, with some entries twice.
    Features beyond d count as 0. Source: arXiv 2507.04239 (tiled symmetric power); `powerplan.dims.tiled_spow_dim`.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1, and is {tile}")
    count = -(-x.shape[-1] // tile)
    tiles = torch.nn.functional.pad(x, (0, count * tile - x.shape[-1])).view(*x.shape[:-1], count, tile)
    indices, weights = multisets(count, p)
    out: Tensor = weights.to(device=x.device, dtype=x.dtype).expand(*x.shape[:-1], -1)[..., None]
    for column in indices.to(x.device).unbind(1):
        out = (out[..., None] * tiles[..., column, None, :]).flatten(-2)
    return out.flatten(-2)
