"""Copies that the kernels of this folder read by TMA, in plain Triton: bound by memory. Legend: ../prologue.py."""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.prologue import chunk_bounds, load_columns, load_gates, load_rows, token_block


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

    x, y are keys and values, and the factor is exp(a_M - a_t). Backward they are queries and gradients of weighted sums,
    and it is exp(a_t) scale^P. It goes into y, not into x: x is multiplied by itself.

    x: [tokens, heads, DIM_X] in. y: [tokens, heads, DIM_Y] in.
    log_g_cumsum: [tokens, G] float32 in, where GATED.
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
            b_exponent = load_gates(p_log_g_cumsum, o_t, m_t, groups, i_group)
            if not BACKWARD:
                last = tl.maximum(stop - 1, 0)
                b_exponent = tl.where(m_t, tl.load(p_log_g_cumsum + last * groups + i_group) - b_exponent, 0.0)
            b_factor = tl.exp(b_exponent)
        if BACKWARD:
            b_factor *= power_scale
        b_y = (b_y.to(tl.float32) * b_factor[:, None]).to(p_y_copy.dtype.element_ty)
    p_rows = p_y_copy + (i_copy * chunk + o_in_chunk) * PADDED_Y
    tl.store(p_rows[:, None] + o_y[None, :], b_y)


@triton.jit
def widen_kernel(p_states, p_wide, TILES: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """Write a state of unordered pairs of tiles as one of all pairs. Grid: slots G TILES (V / BLOCK) programs.

    The gradient of q from phi(q) S is sum over b and v of q_b y_v (S[a, b, v] + S[b, a, v]) for each a: a product with
    the outer product of q and y, whose inner dim (b, v) must be the rows of its right operand.

    states: [slots, G, STEPS 64, V] bf16 in, rows in the order of layout.py, with their weights.
    wide: [slots, G, TILES (b), V / 8, 8 (of b), 8 (of v), 8 TILES (a)] bf16 out.
    BLOCK: columns v of a program.
    """
    HALF: tl.constexpr = TILES // 2
    STEPS: tl.constexpr = TILES * HALF + HALF
    K: tl.constexpr = 8 * TILES
    v_blocks = V // BLOCK
    o_v = tl.program_id(0) % v_blocks * BLOCK + tl.arange(0, BLOCK)
    tile_b = tl.program_id(0) // v_blocks % TILES
    i_state = (tl.program_id(0) // (v_blocks * TILES)).to(tl.int64)
    o_a = tl.arange(0, K)
    o_b = tl.arange(0, 8)
    tile_a = o_a // 8
    # Going around the tiles: b comes `ahead` places after a.
    ahead = (tile_b - tile_a + TILES) % TILES
    a_leads = (ahead < HALF) | ((ahead == HALF) & (tile_a < HALF))
    lead = tl.where(a_leads, tile_a, tile_b)
    apart = tl.where(a_leads, ahead, TILES - ahead)
    step = tl.where(apart == HALF, TILES * HALF + lead, lead * HALF + apart)
    # Row within the step: 8 times the feature of the lead tile, and that of the last.
    row = tl.where(a_leads[None, :], (o_a % 8 * 8)[None, :] + o_b[:, None], o_b[:, None] * 8 + (o_a % 8)[None, :])
    o_state = (step[None, :] * 64 + row)[:, None, :] * V + o_v[None, :, None]
    b_state = tl.load(p_states + i_state * (STEPS * 64 * V) + o_state).to(tl.float32)
    # Only the sum of S[a, b] and S[b, a] counts. A pair of two tiles holds it; a tile with itself holds both.
    other = o_b[:, None] * 8 + (o_a % 8)[None, :]
    o_other = (step[None, :] * 64 + other)[:, None, :] * V + o_v[None, :, None]
    m_same = (apart == 0)[None, None, :] & (o_v >= 0)[None, :, None] & (o_b >= 0)[:, None, None]
    b_state += tl.load(p_states + i_state * (STEPS * 64 * V) + o_other, mask=m_same, other=0.0).to(tl.float32)
    o_row = (tile_b * (V // 8) + o_v // 8)[None, :] * 64 + o_b[:, None] * 8 + (o_v % 8)[None, :]
    p_row = p_wide + i_state * (K * V * K) + o_row * K
    tl.store(p_row[:, :, None] + o_a[None, None, :], b_state.to(p_wide.dtype.element_ty))
