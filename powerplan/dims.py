"""Dimensions of the power embeddings. Accounting and kernels both take them from here.

The power embedding of degree p maps x of dimension d to phi(x) with phi(q).phi(k) = (q.k)^p
(Gelada, Buckman, Zhang, Bach, "Scaling Context Requires Rethinking Attention", arXiv 2507.04239).
"""

from __future__ import annotations

from math import comb

KERNEL_DEGREES = (1, 2, 3, 4)
"""Degrees that powerplan.kernels runs. Odd degrees need normalize=False: their weights have both signs."""


def tpow_dim(d: int, p: int) -> int:
    """Return d^p, the dimension of the full tensor power: one entry for each sequence of p indices."""
    return int(d**p)


def spow_dim(d: int, p: int) -> int:
    """Return C(d+p-1, p), the dimension of the symmetric power: one entry for each multiset of p indices.

    Source: arXiv 2507.04239, Table 3; d=64, p=2 gives 2,080.
    """
    return comb(d + p - 1, p)


def tiled_spow_dim(d: int, p: int, tile: int) -> int:
    """Return C(n+p-1, p) tile^p with n = ceil(d/tile), the dimension of the tiled symmetric power.

    It is the symmetric power over n tiles and the tensor power within them: what a kernel executes that works on blocks
    of `tile` features. It lies between spow (tile 1) and tpow (tile d). If `tile` does not divide d, d is padded.
    Source: arXiv 2507.04239 (tiled spow).
    """
    return comb(-(-d // tile) + p - 1, p) * int(tile**p)


def default_chunk_size(d: int, p: int, engine: str = "torch") -> int:
    """Return the chunk size, in tokens, that the kernels use and the planner counts where none is given.

    At least 128; then the largest power of two up to D, so that attention within a chunk, c (K + V) FLOPs a token,
    stays at or under half of the 4 D V with the state; at most 1,024 for p = 3, and 256 for others. phi of a chunk
    should stay in cache; p = 3 has so much state to touch in each chunk that longer ones pay, and p = 4 expands 32,768
    rows at a time at d = 64, 134 MB for 4 heads of 256 tokens.
    """
    if engine == "triton":
        return {1: 256, 2: 1024}.get(p, 4096)
    longest = 1024 if p == 3 else 256
    return min(longest, max(128, 1 << (spow_dim(d, p).bit_length() - 1)))


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
    want_state: bool = True,
) -> int:
    """Return the matmul FLOPs of a forward pass of chunked power attention over one sequence, 2 per multiply-add.

    To query the state takes 2 H D (V + z) per token, to update it 2 G D (V + z), and attention within a chunk takes
    2 H (K + V) per pair of tokens, the masked half included. D is the tiled dimension; z is 1 with the normaliser.
    Per token this is the planner's chunked form under `--causal full`. Source: arXiv 2507.04239, Appendix F (stages).

    Args:
        tokens: length of the sequence.
        with_state: there is a state before the first token; without one, the first chunk does not query it.
        want_state: the state after the last token is returned; if not, the last chunk is not added to it.
    """
    dim = head_dim if p == 1 else tiled_spow_dim(head_dim, p, tile)
    columns = v_head_dim + int(normalize)
    whole, rest = divmod(tokens, chunk_size)
    querying = tokens if with_state else max(0, tokens - chunk_size)
    updating = tokens if want_state else max(0, tokens - (rest or chunk_size))
    state = 2 * dim * columns * (heads * querying + kv_heads * updating)
    return state + 2 * heads * (head_dim + v_head_dim) * (whole * chunk_size**2 + rest**2)
