"""The symmetric power embeddings phi, with phi(q).phi(k) = (q.k)^p (arXiv 2507.04239)."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement
from math import factorial, sqrt

import torch
from torch import Tensor

from powerplan.dims import LARGEST_PHI, spow_dim, tiled_spow_dim
from powerplan.kernels.checks import DTYPES, check_tensor, is_integer, shown

LARGEST_DEGREE = 16
"""The largest degree of an embedding. The counting (powerplan.mixers) goes as far."""


def multisets(d: int, p: int) -> tuple[Tensor, Tensor]:
    """Return the multisets of p features, and the weight of each in phi.

    Args:
        d: Number of features.
        p: Degree.

    Returns:
        [D, p] int64 with D = C(d+p-1, p), the features of each multiset in rising order, rows in lexicographic order;
        and [D] float64, the square roots of the numbers of orders (multinomial coefficients) of each.
    """
    return _multisets(d, p)


# What torch.compiler.assume_constant_result sets. It would import torch._dynamo: 1.8 s, as much as torch itself.
multisets._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    """Return the symmetric power embedding phi(x): phi(q).phi(k) = (q.k)^p.

    There is one entry for each multiset of p features, in lexicographic order: sqrt(multinomial) times the product of
    these features. The multinomial is the number of orders in which (q.k)^p contains that product. Source: arXiv
    2507.04239, whose Table 3 lists the dimension D = C(d+p-1, p); d = 64, p = 2 gives 2,080.

    Args:
        x: [..., d], floating point.
        p: Degree, 1 to 16.

    Returns:
        [..., D] in the dtype and on the device of x.

    Raises:
        ValueError: x has no dims or no features, p is out of range, or D is beyond 2^24.
        TypeError: x is not a tensor, or has a dtype that is not allowed.
    """
    _check(x, p)
    _check_entries(spow_dim(int(x.shape[-1]), p))
    indices, weights = multisets(x.shape[-1], p)
    out: Tensor = weights.to(device=x.device, dtype=x.dtype).expand(*x.shape[:-1], -1)
    for column in indices.to(x.device).unbind(1):
        out = out * x[..., column]
    return out


def tiled_spow(x: Tensor, p: int, tile: int = 8) -> Tensor:
    """Return the tiled symmetric power embedding of x: phi(q).phi(k) = (q.k)^p, as for `spow`, in fewer, larger pieces.

    Features are split into tiles. For each multiset of p tiles, in lexicographic order, there are all products of one
    feature from each, times the square root of the number of orders of the tiles. Within a tile some products occur
    more than once, so that this embedding is longer than `spow`. Source: arXiv 2507.04239 (tiled symmetric power).

    Args:
        x: [..., d], floating point.
        p: Degree, 1 to 16.
        tile: Features of a tile, at least 1. The last tile is padded with zeros where d is no multiple of it.

    Returns:
        [..., C(n+p-1, p) tile^p] with n = ceil(d / tile), in the dtype and on the device of x; the dimension is
        `powerplan.dims.tiled_spow_dim`.

    Raises:
        ValueError: x has no dims or no features, p or tile is out of range, or the dimension is beyond 2^24.
        TypeError: x is not a tensor, or has a dtype that is not allowed.
    """
    _check(x, p)
    if not is_integer(tile) or tile < 1:
        raise ValueError(f"tile must be an integer of at least 1, and is {shown(tile)}")
    _check_entries(tiled_spow_dim(int(x.shape[-1]), p, tile))
    count = -(-x.shape[-1] // tile)
    tiles = torch.nn.functional.pad(x, (0, count * tile - x.shape[-1])).view(*x.shape[:-1], count, tile)
    indices, weights = multisets(count, p)
    out: Tensor = weights.to(device=x.device, dtype=x.dtype).expand(*x.shape[:-1], -1)[..., None]
    for column in indices.to(x.device).unbind(1):
        out = (out[..., None] * tiles[..., column, None, :]).flatten(-2)
    return out.flatten(-2)


def _check(x: Tensor, p: int) -> None:
    check_tensor("x", x)
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed are {', '.join(str(dtype) for dtype in DTYPES)}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have features in its last dim, and has shape {list(x.shape)}")
    if not is_integer(p) or not 1 <= p <= LARGEST_DEGREE:
        raise ValueError(f"p must be an integer from 1 to {LARGEST_DEGREE}, and is {shown(p)}")


def _check_entries(count: int) -> None:
    if count > LARGEST_PHI:
        raise ValueError(f"phi(x) would have {shown(count)} entries in its last dim, and may have {LARGEST_PHI}")
