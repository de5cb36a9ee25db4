"""The gradient that comes back through phi from a state: the state's part of dq, and of dk. Legend: ../prologue.py.

With y the gradient of phi(x) S, that of a step of phi is y S[step]^T, [rows, 64], and that of the step's two tiles of
x is its sum over one tile times the other. The product is the matrix unit's. Both sums stay within the thread that
holds its result: each holds all 8 features of the lead tile, and of the last tile two, whose sum with those of 3 other
threads waits until the lead tile is done.

Steps are in the order of layout.py: lead tile a has the last tiles a, a + 1, ..., a + n - 1. So the sums for last tiles
are a window of n tiles in registers that moves on by one with each lead tile: tile a leaves it complete, but for what
the first tiles get once more when the order has come around.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from powerplan.kernels.triton.hopper.gluon import all_threads, copy_tile, gl
from powerplan.kernels.triton.hopper.layouts import STEP, TILE, lanes_layout, rows_layout, sums_layout
from powerplan.kernels.triton.hopper.ring import (
    load_ring_tile,
    new_barriers,
    state_decay,
    store_tiles,
    wait_ring_tile,
)
from powerplan.kernels.triton.hopper.within import owned_rows, state_at

UNROLL = gl.constexpr(2)
"""Most steps of an iteration: with 4 ptxas waits for every instruction of a product (C7511), with 8 registers run
out."""


@gluon.jit
def add_to_tile(tiles, i_tile, b_sum, LAYOUT: gl.constexpr):
    """Add [rows, 8] to one of the tiles in shared memory."""
    tile = tiles.index(i_tile)
    tile.store(tile.load(LAYOUT) + b_sum)


@gluon.jit
def step_gradient(product, b_y, step, desc, row, ring, bars, STEPS: gl.constexpr, L3: gl.constexpr):
    """Return the gradient of a step of phi, [rows, 8, 8], and y again. Other programs use the matrix unit meanwhile.

    product: a result of before, whose registers this one takes.
    """
    tile = wait_ring_tile(step, ring, bars)
    product = warpgroup_mma(b_y, tile.permute((1, 0)), product, use_acc=False, is_async=True)
    product, b_y = warpgroup_mma_wait(0, deps=[product, b_y])
    load_ring_tile(desc, row, step + ring.shape[0], ring, bars, STEPS)
    b_dphi = gl.reshape(product, [product.shape[0], TILE, TILE])
    return product, gl.convert_layout(b_dphi, L3, assert_trivial=True), b_y


@gluon.jit
def add_lead_gradient(b_dlead, b_dphi, b_last, L4: gl.constexpr):
    """Add dphi [rows, 8, 8] times the last tile [rows, 8], summed over it within each of 4 threads: [rows, 8, 4]."""
    ROWS: gl.constexpr = b_dphi.shape[0]
    PART: gl.constexpr = gl.SliceLayout(3, L4)
    FACTOR: gl.constexpr = gl.SliceLayout(1, PART)
    # The two features that a thread holds, apart: one multiply-add each, where their sum takes half as much again.
    pairs = gl.convert_layout(gl.reshape(b_dphi, [ROWS, TILE, 4, 2]), L4, assert_trivial=True)
    factors = gl.convert_layout(gl.reshape(b_last, [ROWS, 4, 2]), gl.SliceLayout(1, L4), assert_trivial=True)
    b_even, b_odd = gl.split(pairs)
    b_even_factor, b_odd_factor = gl.split(factors)
    b_dlead += gl.convert_layout(b_even, PART) * gl.expand_dims(gl.convert_layout(b_even_factor, FACTOR), 1)
    b_dlead += gl.convert_layout(b_odd, PART) * gl.expand_dims(gl.convert_layout(b_odd_factor, FACTOR), 1)
    return b_dlead


@gluon.jit
def contract_kernel(
    state_desc,
    y_desc,
    p_x,
    p_log_g_cumsum,
    p_chunks,
    p_part,
    s_xt,
    s_xh,
    groups,
    token_blocks,
    power_scale,
    K: gl.constexpr,
    TILES: gl.constexpr,
    COLUMNS: gl.constexpr,
    REPEATS: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    OF_KEYS: gl.constexpr,
    GATED: gl.constexpr,
    HAS_START: gl.constexpr,
):
    """Compute the gradient of x from that of phi(x) S for BM tokens of one head, p = 2.

    Grid: slots heads token_blocks programs.

    state: [slots G rows, COLUMNS] bf16 in, by descriptor, tiles [64, COLUMNS]: the state before each chunk; OF_KEYS its
        gradient after the chunk.
    y: [tokens, heads COLUMNS] bf16 in, by descriptor, tiles of BM rows of a head: the gradient of the sum of weighted
        values; OF_KEYS the values.
    x: [tokens, heads, K] in, queries; OF_KEYS keys.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED. chunks: [slots, 4] int64 in.
    part: [tokens, heads, K] bf16 or float32 out: the gradient, times power_scale and the decay between the state and
        the token. Not written for chunks that have no state.
    TILES: tiles of x, even. COLUMNS: head dim of y, padded. REPEATS: heads of a group in x.
    HAS_START: whether the sequence's first chunk (OF_KEYS: its last) has such a state, too.
    """
    HALF: gl.constexpr = TILES // 2
    STEPS: gl.constexpr = (TILES + 1) * HALF
    PART: gl.constexpr = HALF if HALF < UNROLL else UNROLL
    WARPS: gl.constexpr = gl.num_warps()
    L3: gl.constexpr = rows_layout(BM, WARPS)
    L4: gl.constexpr = lanes_layout(BM, WARPS)
    LEAD: gl.constexpr = gl.SliceLayout(2, L3)
    LAST: gl.constexpr = gl.SliceLayout(1, L3)
    SUMS: gl.constexpr = sums_layout(STEP, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
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
        x_tiles = gl.allocate_shared_memory(
            p_x.dtype.element_ty, [TILES, BM, TILE], gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
        )
        dx_tiles = gl.allocate_shared_memory(gl.float32, [TILES, BM, TILE], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        store_tiles(p_x + i_head.to(gl.int64) * s_xh, s_xt, first, stop, x_tiles, K, TILES, BM, WARPS)
        all_threads()
        mbarrier.wait(bars.index(STAGES), 0)

        product = gl.zeros([BM, STEP], gl.float32, SUMS)
        window = ()
        for i in gl.static_range(HALF):
            window = window + (gl.zeros([BM, TILE], gl.float32, LAST),)
        for lead in range(TILES):
            b_lead = x_tiles.index(lead).load(LEAD).to(gl.float32)
            b_dlead = gl.zeros([BM, TILE, 4], gl.float32, gl.SliceLayout(3, L4))
            for i_part in range(HALF // PART):
                # Loaded anew in each iteration: Triton before 3.7.1 loses operands in registers that a loop reuses.
                b_y = y_tile.load(LEFT)
                for i in gl.static_range(PART):
                    ahead = i_part * PART + i
                    b_last = x_tiles.index((lead + ahead) % TILES).load(LAST).to(gl.float32)
                    step = lead * HALF + ahead
                    product, b_dphi, b_y = step_gradient(product, b_y, step, state_desc, row, ring, bars, STEPS, L3)
                    b_dlead = add_lead_gradient(b_dlead, b_dphi, b_last, L4)
                    b_dlast = window[i] + gl.sum(b_dphi * gl.expand_dims(b_lead, 2), 1)
                    window = window[:i] + (b_dlast,) + window[i + 1 :]
                # The next part's tiles come first; after the last part the window is as it was.
                window = window[PART:] + window[:PART]
            dx_tiles.index(lead).store(window[0] + gl.convert_layout(gl.sum(b_dlead, 2), LAST))
            window = window[1:] + (gl.zeros([BM, TILE], gl.float32, LAST),)
        for i in gl.static_range(HALF - 1):
            add_to_tile(dx_tiles, i, window[i], LAST)
        # The pairs (a, a + HALF).
        b_y = y_tile.load(LEFT)
        for i in gl.static_range(HALF):
            step = TILES * HALF + i
            product, b_dphi, b_y = step_gradient(product, b_y, step, state_desc, row, ring, bars, STEPS, L3)
            b_lead = x_tiles.index(i).load(LEAD).to(gl.float32)
            b_last = x_tiles.index(i + HALF).load(LAST).to(gl.float32)
            add_to_tile(dx_tiles, i + HALF, gl.sum(b_dphi * gl.expand_dims(b_lead, 2), 1), LAST)
            b_dlead = gl.zeros([BM, TILE, 4], gl.float32, gl.SliceLayout(3, L4))
            b_dlead = add_lead_gradient(b_dlead, b_dphi, b_last, L4)
            add_to_tile(dx_tiles, i, gl.convert_layout(gl.sum(b_dlead, 2), LAST), LAST)
        all_threads()

        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
        o_row = first + gl.arange(0, BM, gl.SliceLayout(1, ROWS))
        o_f = gl.arange(0, TILE, gl.SliceLayout(0, ROWS))
        b_decay = state_decay(p_log_g_cumsum, o_row, stop, groups, i_group, power_scale, OF_KEYS, GATED)
        o_first = gl.expand_dims((o_row.to(gl.int64) * (groups * REPEATS) + i_head) * K, 1)
        for i in gl.static_range(TILES):
            b_part = dx_tiles.index(i).load(ROWS) * gl.expand_dims(b_decay, 1)
            o_feature = i * TILE + o_f
            m_part = gl.expand_dims(o_row < stop, 1) & gl.expand_dims(o_feature < K, 0)
            gl.store(p_part + (o_first + gl.expand_dims(o_feature, 0)), b_part.to(p_part.dtype.element_ty), mask=m_part)
