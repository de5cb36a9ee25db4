"""Dimensions of the power embeddings. Accounting and kernels both take them from here.

The power embedding of degree p maps x of dimension d to phi(x) with phi(q).phi(k) = (q.k)^p
(Gelada, Buckman, Zhang, Bach, "Scaling Context Requires Rethinking Attention", arXiv 2507.04239).
"""

from __future__ import annotations

from math import comb
from operator import index

KERNEL_DEGREES = (1, 2, 3, 4)
"""Degrees that powerplan.kernels runs. Odd degrees need normalize=False: their weights have both signs."""

LARGEST_PHI = 2**24
"""The most entries of phi. Its features are listed one by one; beyond, 64 columns of one state take 4 GB."""

TRITON_HEAD_DIMS = {1: 128, 2: 128, 3: 64, 4: 32}
"""Largest head dim of q and k by degree in the Triton kernels, as blocks.json has entries for.

Beyond it phi has at least 84,480 rows for p = 3 (head dim 72) and 286,720 for p = 4 (head dim 40).
"""

TRITON_V_HEAD_DIM = 128
"""Largest head dim of v in the Triton kernels, as blocks.json has entries for."""

HOPPER_HEAD_DIMS = {2: 128}
"""Largest head dim of q and k by degree in the engine for Hopper GPUs. These kernels ran on an H100."""

UNTRIED_HOPPER_HEAD_DIMS = {1: 128, 3: 64, 4: 32}
"""The same for kernels of that engine that no GPU has run yet: POWERPLAN_HOPPER=all asks for them."""

UNTRIED_HOPPER_FP16_HEAD_DIMS = {2: 128}
"""The same in fp16, which takes the kernels of bf16 with scaled operands (kernels/triton/hopper/float16.py)."""


def odd_degree(p: int) -> bool:
    """Whether the weights (q.k)^p have both signs: their sum may be 0 or negative, and divides nothing."""
    return p % 2 == 1


def hopper_takes(p: int, head_dim: int, v_head_dim: int, untried: bool = False, dtype: str = "bf16") -> bool:
    """Whether the engine for Hopper GPUs takes a degree and head dims in a dtype; untried: as no GPU has run it."""
    tables = {"bf16": (HOPPER_HEAD_DIMS, UNTRIED_HOPPER_HEAD_DIMS), "fp16": ({}, UNTRIED_HOPPER_FP16_HEAD_DIMS)}
    tried, others = tables.get(dtype, ({}, {}))
    largest = tried | others if untried else tried
    return head_dim <= largest.get(p, 0) and v_head_dim <= TRITON_V_HEAD_DIM


def kernels_for(p: int, head_dim: int, v_head_dim: int) -> list[str]:
    """Return which kernels of `powerplan.kernels` take a degree and head dims in bf16, of "torch", "triton", "hopper".

    torch runs on any device, triton on GPUs, hopper on GPUs of compute capability 9.0. Odd degrees run without the
    normaliser alone.
    """
    takes = {
        "torch": p in KERNEL_DEGREES and spow_dim(head_dim, p) <= LARGEST_PHI,
        "triton": head_dim <= TRITON_HEAD_DIMS.get(p, 0) and v_head_dim <= TRITON_V_HEAD_DIM,
        "hopper": hopper_takes(p, head_dim, v_head_dim),
    }
    return [engine for engine, taken in takes.items() if taken]


def tpow_dim(d: int, p: int) -> int:
    """Return d^p, the dimension of the full tensor power: one entry for each sequence of p indices."""
    return int(index(d) ** index(p))  # A power of numpy's integers would overflow.


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
    return comb(-(-d // tile) + p - 1, p) * int(int(tile) ** int(p))


def default_chunk_size(head_dim: int, p: int, engine: str = "torch") -> int:
    """Return the chunk size, in tokens, that an engine of `powerplan.kernels` takes where none is given.

    "torch" (any device; the planner counts its FLOPs with this size): the largest power of two up to D, so that
    attention within a chunk, c (K + V) FLOPs per token, stays at or under half of the 4 D V for the state; at least
    128, and at most 256, or 1,024 for p = 3, because phi of a chunk should stay in cache. For p = 3 each chunk touches
    so much state that longer chunks pay. p = 4 expands 28,672 rows at a time at head dim 64: 117 MB for 4 heads of 256
    tokens.

    "triton" (GPUs): 256 for p = 1; for p = 2 1,024, and 2,048 for head dims above 64; 4,096 above. The state is written
    and read once per chunk, 4 D V bytes in bf16, and longer chunks spread that over more tokens: in chunks of 1,024 (K
    = V = 64, p = 2) it is 576 bytes per token, beside 512 for q, k, v and out. phi stays in registers, so no cache
    limits the chunk. On an H100 a training step of 64k tokens and 8 heads of 128 takes 18.0 ms in chunks of 1,024 and
    16.8 in chunks of 2,048; of 64, 4.4 ms in chunks of 1,024 and 4.8 in chunks of 512.
    """
    if engine == "triton":
        if p == 2:
            return 1024 if head_dim <= 64 else 2048
        return 256 if p == 1 else 4096
    if engine != "torch":
        raise ValueError(f"engine must be torch or triton, and is {engine!r}")
    longest = 1024 if p == 3 else 256
    return min(longest, max(128, 1 << (spow_dim(head_dim, p).bit_length() - 1)))


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
    has_initial_state: bool = False,
    return_state: bool = True,
) -> int:
    """Return the matmul FLOPs of a forward pass of chunked power attention over one sequence, 2 per multiply-add.

    2 H D (V + z) to query the state for each token after the first chunk (for every token if `has_initial_state`),
    2 G D (V + z) to update the state for each token, and 2 H (K + V) for each pair of tokens of one chunk, the masked
    half included. D is the tiled dimension, and z is 1 with the normaliser, else 0. Per token this is the planner's
    chunked form under `--causal full`, which counts the state after the last token, since the next token would need it.
    Without `return_state` nobody reads that state, and the kernels do not add the last chunk to it. Source: arXiv
    2507.04239, Appendix F (the stages).
    """
    dim = head_dim if p == 1 else tiled_spow_dim(head_dim, p, tile)
    columns = v_head_dim + int(normalize)
    whole, rest = divmod(tokens, chunk_size)
    querying = tokens if has_initial_state else max(0, tokens - chunk_size)
    updating = tokens if return_state else max(0, tokens - (rest or chunk_size))
    state = 2 * dim * columns * (heads * querying + kv_heads * updating)
    return state + 2 * heads * (head_dim + v_head_dim) * (whole * chunk_size**2 + rest**2)
