"""Copies that the kernels of this folder read by TMA, in plain Triton: bound by memory. Legend: ../prologue.py."""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.prologue import chunk_bounds, load_columns, load_sum, load_sums, token_block


@triton.jit
def copy_kernel(
    p_x,
    p_y,
    p_log_g_cumsum,
    p_chunks,
    p_xt,
    p_y_copy,
    s_xt,
    s_xh,
    s_yt,
    s_yh,
    groups,
    token_blocks,
    chunk,
    power_scale,
    DIM_X: tl.constexpr,
    DIM_Y: tl.constexpr,
    PADDED_X: tl.constexpr,
    PADDED_Y: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Copy x with time last, and y times what multiplies a token. Grid: slots heads token_blocks programs.

    x, y are keys and values, and the factor is exp(a_M - a_t). Backward they are queries and gradients of weighted
    sums, and it is exp(a_t) scale^P. It goes into y, not into x: x is multiplied by itself.

    x: [tokens, heads, DIM_X] in. y: [tokens, heads, DIM_Y] in.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED.
    chunks: [slots, 4] int64 in.
    xt: [slots, heads, PADDED_X, chunk] bf16 out. y_copy: [slots, heads, chunk, PADDED_Y] bf16 out. Both are 0 for
        tokens past the chunk's end, and for features that are padding.
    chunk: tokens of a slot in the copies, token_blocks BLOCK. REPEATS: heads of a group in x and y.
    """
    i_block = tl.program_id(0) % token_blocks
    i_copy = (tl.program_id(0) // token_blocks).to(tl.int64)
    i_head = i_copy % (groups * REPEATS)
    i_group = i_head // REPEATS
    i_chunk = i_copy // (groups * REPEATS)
    start, stop = chunk_bounds(p_chunks, i_chunk)
    o_in_chunk = i_block * BLOCK + tl.arange(0, BLOCK)
    o_t, m_t = token_block(start + i_block * BLOCK, stop, BLOCK)
    o_x, o_y = tl.arange(0, PADDED_X), tl.arange(0, PADDED_Y)
    b_x = load_columns(p_x + i_head * s_xh, s_xt, o_t, m_t, 0, DIM_X, PADDED_X)
    p_rows = p_xt + i_copy * PADDED_X * chunk
    tl.store(p_rows + o_x[:, None] * chunk + o_in_chunk[None, :], tl.trans(b_x))
    b_y = load_columns(p_y + i_head * s_yh, s_yt, o_t, m_t, 0, DIM_Y, PADDED_Y)
    if GATED or BACKWARD:
        b_factor = tl.full([BLOCK], 1.0, tl.float32)
        if GATED:
            b_exponent, b_rest = load_sums(p_log_g_cumsum, o_t, m_t, groups, i_group)
            if not BACKWARD:
                b_total, b_total_rest = load_sum(p_log_g_cumsum, tl.maximum(stop - 1, 0), groups, i_group)
                b_exponent = tl.where(m_t, (b_total - b_exponent) + (b_total_rest - b_rest), 0.0)
            b_factor = tl.exp(b_exponent)
        if BACKWARD:
            b_factor *= power_scale
        b_y = (b_y.to(tl.float32) * b_factor[:, None]).to(p_y_copy.dtype.element_ty)
    p_rows = p_y_copy + (i_copy * chunk + o_in_chunk) * PADDED_Y
    tl.store(p_rows[:, None] + o_y[None, :], b_y)
