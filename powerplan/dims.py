"""Dimensions of the power embeddings: the only definition, used by the accounting and by the kernels.

The symmetric power of degree p maps x of dimension d to phi(x) with phi(q).phi(k) = (q.k)^p
(Gelada, Buckman, Zhang, Bach, "Scaling Context Requires Rethinking Attention", arXiv 2507.04239).
"""

from __future__ import annotations

from math import comb


def tpow_dim(d: int, p: int) -> int:
    """Return d^p, the dimension of the full tensor power."""
    return int(d**p)


def spow_dim(d: int, p: int) -> int:
    """Return C(d+p-1, p), the dimension of the symmetric power: one entry for each multiset of p indices.

    Source: arXiv 2507.04239, Table 3; d=64, p=2 gives 2,080.
    """
    return comb(d + p - 1, p)


def tiled_spow_dim(d: int, p: int, tile: int) -> int:
    """Return C(n+p-1, p) tile^p with n = ceil(d/tile): the symmetric power of tiles, dense within a tile.

    This is what a kernel executes that works on blocks of `tile` features; a `d` that is no multiple of
    `tile` is padded. Between spow (tile 1) and tpow (tile d). Source: arXiv 2507.04239 (tiled spow).
    """
    return comb(-(-d // tile) + p - 1, p) * int(tile**p)


def default_chunk_size(d: int, p: int) -> int:
    """Return the chunk size, in tokens, used where none is given: a power of two from 128 to 8,192.

    A token costs about 4 D V FLOPs with the state and, in a causal chunk of c, c (K + V) within the chunk. The
    power of two nearest below D keeps the second at or under half of the first while the state, D V elements
    written once a chunk, stays a small traffic beside the inputs.
    """
    dim = spow_dim(d, p)
    return min(8192, max(128, 1 << (dim.bit_length() - 1)))


def chunked_power_flops(
    tokens: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    p: int,
    tile: int,
    chunk_size: int,
    normalize: bool = True,
    with_state: bool = False,
) -> int:
    """Return the matmul FLOPs of chunked power attention over one sequence of `tokens`, forward, 2 per multiply-add.

    2 H D (V + z) to query the state for each token after the first chunk (for all `with_state`, an initial one),
    2 G D (V + z) to update it for each token, and 2 H (K + V) for each pair of tokens of one chunk, the masked half
    included; D is the tiled dimension, z counts the normaliser. Per token this is the planner's chunked form under
    `--causal full`. Source: arXiv 2507.04239, Appendix F (the stages).
    """
    dim = head_dim if p == 1 else tiled_spow_dim(head_dim, p, tile)
    columns = v_head_dim + int(normalize)
    whole, rest = divmod(tokens, chunk_size)
    asking = tokens if with_state else max(0, tokens - chunk_size)
    state = 2 * dim * columns * (heads * asking + kv_heads * tokens)
    return state + 2 * heads * (head_dim + v_head_dim) * (whole * chunk_size**2 + rest**2)
