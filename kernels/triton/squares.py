"""Sums of x x^T over each chunk: the normaliser's state for p = 2, and its gradient. Legend: prologue.py.

phi(q).phi(k) = (q.k)^2 = q^T (k k^T) q, so that the normaliser needs Z = sum k k^T, [K, K], and no sum of phi(k).
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.features import fine_product
from powerplan.kernels.triton.prologue import chunk_bounds, load_columns, load_sum, load_sums, token_block


@triton.jit
def squares_kernel(
    p_x,
    p_log_g_cumsum,
    p_grad_norm,
    p_chunks,
    p_parts,
    s_xt,
    s_xh,
    groups,
    power_scale,
    K: tl.constexpr,
    BK: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    BACKWARD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum x x^T of each chunk, each token times its factor. Grid: slots G programs.

    The factor is exp(a_M - a_t). Backward x are queries, and it is exp(a_t) scale^2 times the gradient of norm.

    x: [tokens, heads, K] in.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED.
    grad_norm: [tokens, heads] float32 in, BACKWARD.
    chunks: [slots, 4] int64 in.
    parts: [slots, G, BK, BK] float32 out. Zeros for a slot without tokens.
    REPEATS: heads of a group in x: 1 forward. BLOCK: tokens that a product sums over.
    """
    i_chunk = (tl.program_id(0) // groups).to(tl.int64)
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    start, stop = chunk_bounds(p_chunks, i_chunk)
    o_k = tl.arange(0, BK)
    if GATED:
        b_total, b_total_rest = load_sum(p_log_g_cumsum, tl.maximum(stop - 1, 0), groups, i_group)
    b_sum = tl.zeros([BK, BK], tl.float32)
    token_blocks = tl.cdiv(stop - start, BLOCK)
    for i_block in range(token_blocks * REPEATS):
        i_head = i_group * REPEATS + i_block // token_blocks
        o_t, m_t = token_block(start + (i_block % token_blocks) * BLOCK, stop, BLOCK)
        b_x = load_columns(p_x + i_head * s_xh, s_xt, o_t, m_t, 0, K, BK)
        b_factor = tl.full([BLOCK], 1.0, tl.float32)
        if GATED:
            b_cumsum, b_rest = load_sums(p_log_g_cumsum, o_t, m_t, groups, i_group)
            b_factor = tl.exp(b_cumsum if BACKWARD else (b_total - b_cumsum) + (b_total_rest - b_rest))
        if BACKWARD:
            b_grad_norm = tl.load(p_grad_norm + o_t * (groups * REPEATS) + i_head, mask=m_t, other=0.0)
            b_factor *= power_scale * b_grad_norm
        # [BK, BLOCK] @ [BLOCK, BK] -> [BK, BK]
        b_right = b_x.to(tl.float32) * b_factor[:, None]
        b_sum = fine_product(tl.trans(b_x.to(OPERAND)), b_right, b_sum, OPERAND, PRECISION)
    p_rows = p_parts + (i_chunk * groups + i_group) * (BK * BK) + o_k * BK
    tl.store(p_rows[:, None] + o_k[None, :], b_sum)
