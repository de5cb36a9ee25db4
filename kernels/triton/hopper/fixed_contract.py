"""The gradient that comes back through phi from a state for p = 3 and 4: its part of dq, and of dk.

As contract.py, but a step of phi has one or two fixed features beside its tiles: with s the product of these, a step is
s lead last^T. Its gradient D, [rows, 64], is a product of the matrix unit. Two multiply-adds for each entry of D give
all that follows: the sum of s D over the steps of a fixed tile, which leads to the gradients of both tiles once for all
of them, and D^T lead, whose product with the last tile is the gradient of s. Legend: ../prologue.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from powerplan.kernels.triton.hopper.contract import UNROLL, add_lead_gradient, step_gradient
from powerplan.kernels.triton.hopper.fixed_tiles import ROW, outer_features, store_rows, tile_of
from powerplan.kernels.triton.hopper.gluon import all_threads, copy_tile, gl
from powerplan.kernels.triton.hopper.layouts import STEP, TILE, lanes_layout, rows_layout, sums_layout
from powerplan.kernels.triton.hopper.ring import load_ring_tile, new_barriers, state_decay
from powerplan.kernels.triton.hopper.within import owned_rows, state_at


@gluon.jit
def dot_in_thread(b_x, b_y, L4: gl.constexpr):
    """Return the sums over pairs of features of x y, [rows, 8] each: [rows, 4], one value for each of 4 threads."""
    ROWS: gl.constexpr = b_x.shape[0]
    QUAD: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, L4))
    pairs = gl.convert_layout(gl.reshape(b_x * b_y, [ROWS, 4, 2]), gl.SliceLayout(1, L4), assert_trivial=True)
    b_even, b_odd = gl.split(pairs)
    return gl.convert_layout(b_even, QUAD) + gl.convert_layout(b_odd, QUAD)


@gluon.jit
def over_quads(b_x, QUAD: gl.constexpr):
    """Return x [tokens] as [tokens, 1] for a product with values of 4 threads each."""
    return gl.expand_dims(gl.convert_layout(b_x, gl.SliceLayout(1, QUAD)), 1)


@gluon.jit
def add_to_row(rows, feature, b_quads, QUAD: gl.constexpr):
    """Add [tokens, 4], the parts of 4 threads, to the gradient of one feature."""
    row = rows.index(feature)
    row.store(row.load(gl.SliceLayout(1, QUAD)) + gl.sum(b_quads, 1))


@gluon.jit
def fixed_contract_kernel(
    state_desc,
    y_desc,
    p_x,
    p_log_g_cumsum,
    p_chunks,
    p_more,
    p_factor,
    p_part,
    s_xt,
    s_xh,
    groups,
    token_blocks,
    power_scale,
    P: gl.constexpr,
    K: gl.constexpr,
    TILES: gl.constexpr,
    STEPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    REPEATS: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    OF_KEYS: gl.constexpr,
    GATED: gl.constexpr,
    NORMALIZE: gl.constexpr,
    HAS_START: gl.constexpr,
):
    """Compute the gradient of x from that of phi(x) S for BM tokens of one head, p = 3 or 4.

    Grid: slots heads token_blocks programs.

    state, y, x, log_g_cumsum, chunks: as in contract_kernel.
    more: [tokens, heads, K] float32 in, where NORMALIZE: a P-th of what the normaliser adds, with its decay.
    factor: [tokens, heads] float32 in, where NORMALIZE and not OF_KEYS: what multiplies it, the gradient of norm.
    part: [tokens, heads, K] bf16 or float32 out: the gradient, with what the normaliser adds. Not written for chunks
        that have no state.
    TILES: tiles of x, the last one perhaps in part. STEPS: steps of phi. COLUMNS: head dim of y, padded. REPEATS: heads
        of a group in x.
    HAS_START: whether the sequence's first chunk (OF_KEYS: its last) has such a state, too.
    """
    WARPS: gl.constexpr = gl.num_warps()
    L3: gl.constexpr = rows_layout(BM, WARPS)
    L4: gl.constexpr = lanes_layout(BM, WARPS)
    LEAD: gl.constexpr = gl.SliceLayout(2, L3)
    LAST: gl.constexpr = gl.SliceLayout(1, L3)
    COLUMN: gl.constexpr = gl.SliceLayout(1, LEAD)
    PART: gl.constexpr = gl.SliceLayout(3, L4)
    QUAD: gl.constexpr = gl.SliceLayout(1, PART)
    SUMS: gl.constexpr = sums_layout(STEP, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    i_chunk, _, stop, i_group, i_head, first = owned_rows(p_chunks, groups, token_blocks, BM, REPEATS)
    if (first < stop) & state_at(p_chunks, i_chunk, 3 if OF_KEYS else 2, HAS_START):
        ring = gl.allocate_shared_memory(state_desc.dtype, [STAGES, STEP, COLUMNS], state_desc.layout)
        y_tile = gl.allocate_shared_memory(y_desc.dtype, [BM, COLUMNS], y_desc.layout)
        bars = new_barriers(STAGES + 1)
        row = (i_chunk * groups + i_group) * (STEPS * STEP)
        for i in gl.static_range(STAGES):
            load_ring_tile(state_desc, row, i, ring, bars, STEPS)
        mbarrier.expect(bars.index(STAGES), BM * COLUMNS * 2)
        copy_tile(y_desc, [first, i_head * COLUMNS], bars.index(STAGES), y_tile)
        x_rows = gl.allocate_shared_memory(p_x.dtype.element_ty, [TILES * TILE, BM], ROW)
        dx_rows = gl.allocate_shared_memory(gl.float32, [TILES * TILE, BM], ROW)
        store_rows(p_x + i_head.to(gl.int64) * s_xh, s_xt, first, stop, x_rows, K, TILES, WARPS)
        for i in gl.static_range(TILES):
            tile_of(dx_rows, i, TILES).store(gl.zeros([BM, TILE], gl.float32, ROWS))
        all_threads()
        mbarrier.wait(bars.index(STAGES), 0)

        product = gl.zeros([BM, STEP], gl.float32, SUMS)
        step = first * 0
        for lead in range(TILES):
            b_lead = tile_of(x_rows, lead, TILES).load(LEAD).to(gl.float32)
            b_dlead = gl.zeros([BM, TILE, 4], gl.float32, PART)
            for inner in range(lead + 1):
                b_dinner = ()
                for i in gl.static_range(TILE):
                    b_dinner = b_dinner + (gl.zeros([BM, 4], gl.float32, QUAD),)
                for last in range(lead, TILES):
                    b_last = tile_of(x_rows, last, TILES).load(LAST).to(gl.float32)
                    b_sum = gl.zeros([BM, TILE, TILE], gl.float32, L3)
                    for i_outer in range(outer_features(inner, P)):
                        if P == 4:
                            b_outer = x_rows.index(i_outer).load(COLUMN).to(gl.float32)
                            b_douter = gl.zeros([BM, 4], gl.float32, QUAD)
                        for i_part in range(TILE // UNROLL):
                            # Loaded anew in each iteration: Triton before 3.7.1 loses operands in registers that a loop
                            # reuses.
                            b_y = y_tile.load(LEFT)
                            for i in gl.static_range(UNROLL):
                                feature = inner * TILE + i_part * UNROLL + i
                                product, b_dphi, b_y = step_gradient(
                                    product, b_y, step + i, state_desc, row, ring, bars, STEPS, L3
                                )  # fmt: skip
                                # Loaded behind the product: it would take registers while that runs.
                                b_inner = x_rows.index(feature).load(COLUMN).to(gl.float32)
                                b_dfixed = dot_in_thread(gl.sum(b_dphi * gl.expand_dims(b_lead, 2), 1), b_last, L4)
                                b_factor = b_inner
                                if P == 4:
                                    b_douter += b_dfixed * over_quads(b_inner, QUAD)
                                    b_dfixed *= over_quads(b_outer, QUAD)
                                    b_factor = b_inner * b_outer
                                b_sum += b_dphi * gl.expand_dims(gl.expand_dims(b_factor, 1), 2)
                                b_dinner = b_dinner[:i] + (b_dinner[i] + b_dfixed,) + b_dinner[i + 1 :]
                            # The next part's features come first; after the last part the tuple is as it was.
                            b_dinner = b_dinner[UNROLL:] + b_dinner[:UNROLL]
                            step += UNROLL
                        if P == 4:
                            add_to_row(dx_rows, i_outer, b_douter, QUAD)
                    tile = tile_of(dx_rows, last, TILES)
                    tile.store(tile.load(LAST) + gl.sum(b_sum * gl.expand_dims(b_lead, 2), 1))
                    b_dlead = add_lead_gradient(b_dlead, b_sum, b_last, L4)
                for i in gl.static_range(TILE):
                    add_to_row(dx_rows, inner * TILE + i, b_dinner[i], QUAD)
            tile = tile_of(dx_rows, lead, TILES)
            tile.store(tile.load(LAST) + gl.convert_layout(gl.sum(b_dlead, 2), LAST))
        all_threads()

        o_row = first + gl.arange(0, BM, gl.SliceLayout(1, ROWS))
        o_f = gl.arange(0, TILE, gl.SliceLayout(0, ROWS))
        b_decay = state_decay(p_log_g_cumsum, o_row, stop, groups, i_group, power_scale, OF_KEYS, GATED)
        o_token = o_row.to(gl.int64) * (groups * REPEATS) + i_head
        if NORMALIZE:
            b_factor = o_row.to(gl.float32) * 0.0 + P
            if not OF_KEYS:
                b_factor *= gl.load(p_factor + o_token, mask=o_row < stop, other=0.0)
        for i in gl.static_range(TILES):
            b_part = tile_of(dx_rows, i, TILES).load(ROWS) * gl.expand_dims(b_decay, 1)
            o_feature = i * TILE + o_f
            o_part = gl.expand_dims(o_token * K, 1) + gl.expand_dims(o_feature, 0)
            m_part = gl.expand_dims(o_row < stop, 1) & gl.expand_dims(o_feature < K, 0)
            if NORMALIZE:
                b_part += gl.load(p_more + o_part, mask=m_part, other=0.0) * gl.expand_dims(b_factor, 1)
            gl.store(p_part + o_part, b_part.to(p_part.dtype.element_ty), mask=m_part)
