"""Products of outer products with a state: the one kernel behind the state's part of out, dq, dk and dv.

For each token t, sum over steps (a, b) of outer(x_t[tile a], y_t[tile b]) B[step], each step 64 products of two tiles
of 8 features, and B[step] a [64, N] tile of the state. The outer product is made in registers, in the layout of wgmma's
left operand, and so never in memory; B comes by TMA into a ring of tiles.

| result | x | y | B |
|---|---|---|---|
| out | q | q | the state before the chunk, [rows, V] |
| dv | k | k | the gradient of the state after the chunk, [rows, V] |
| dq | q | y, the gradient of the weighted sum | the state, widened: [K V, K] |
| dk | k | v | its gradient, widened: [K V, K] |

For out and dv a step is an unordered pair of tiles, in the order of layout.py: (a, a + d) for d < TILES / 2, all of one
lead tile in turn, and last the pairs (a, a + TILES / 2). So every lead tile has as many steps, and the loop over them
can be unrolled while the one over lead tiles is not. For dq and dk (a, b) are all pairs.

Legend: ../prologue.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from powerplan.kernels.triton.hopper.gluon import all_threads, copy_tile, gl
from powerplan.kernels.triton.hopper.layouts import STEP, TILE, rows_layout, sums_layout

UNROLL = gl.constexpr(8)
"""Steps between two points where no product is under way."""


@gluon.jit
def load_ring_tile(b_desc, row, step, ring, bars, STEPS: gl.constexpr):
    """Start the copy of a step's tile into its place in the ring; nothing beyond the last step."""
    slot = step % ring.shape[0]
    wanted = step < STEPS
    mbarrier.expect(bars.index(slot), STEP * ring.shape[2] * 2, pred=wanted)
    copy_tile(b_desc, [row + step * STEP, 0], bars.index(slot), ring.index(slot), pred=wanted)


@gluon.jit
def outer(b_lead, b_last, LEFT: gl.constexpr):
    """[rows, 8] x [rows, 8] -> [rows, 64], the left operand of a product; moves nothing between threads."""
    products = gl.expand_dims(b_lead, 2) * gl.expand_dims(b_last, 1)
    return gl.convert_layout(gl.reshape(products, [b_lead.shape[0], STEP]), LEFT, assert_trivial=True)


@gluon.jit
def store_tiles(
    p_x,
    s_xt,
    o_t,
    m_t,
    x_tiles,
    DIM: gl.constexpr,
    TILES: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Copy tokens o_t of x to shared memory as tiles [TILES, tokens, 8]."""
    o_f = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT))
    for i_tile in gl.static_range(TILES):
        o_feature = i_tile * TILE + o_f
        mask = gl.expand_dims(m_t, 1) & gl.expand_dims(o_feature < DIM, 0)
        b_x = gl.load(p_x + gl.expand_dims(o_t * s_xt, 1) + gl.expand_dims(o_feature, 0), mask=mask, other=0.0)
        x_tiles.index(i_tile).store(b_x)


@gluon.jit
def multiply_step(acc, b_outer, b_before, b_desc, row, step, ring, bars, STEPS: gl.constexpr):
    """Add a step's product to acc, and wait for that of the step before.

    The left operand of a product under way is in registers that nobody may write to. It is handed to the wait that
    completes the product, which keeps these registers.
    """
    STAGES: gl.constexpr = ring.shape[0]
    mbarrier.wait(bars.index(step % STAGES), (step // STAGES) & 1)
    acc = warpgroup_mma(b_outer, ring.index(step % STAGES), acc, is_async=True)
    acc, _ = warpgroup_mma_wait(1, deps=[acc, b_before])
    # The product of the step before is complete, and its place in the ring free.
    load_ring_tile(b_desc, row, step + STAGES - 1, ring, bars, STEPS)
    return acc


@gluon.jit
def multiply_round(
    acc,
    x_tiles,
    y_tiles,
    b_desc,
    row,
    first_lead,
    first_step,
    ring,
    bars,
    LEADS: gl.constexpr,
    INNER: gl.constexpr,
    TILES: gl.constexpr,
    SYMMETRIC: gl.constexpr,
    STEPS: gl.constexpr,
    L3: gl.constexpr,
    LEFT: gl.constexpr,
):
    """Add the steps of LEADS lead tiles to acc, INNER of each. No product is under way before or after.

    A loop reuses the registers of its body, where a left operand would lie that is still read.
    """
    b_before = gl.zeros([acc.shape[0], STEP], x_tiles.dtype, LEFT)
    for i in gl.static_range(LEADS * INNER):
        lead = first_lead + i // INNER
        if i % INNER == 0:
            b_lead = x_tiles.index(lead).load(gl.SliceLayout(2, L3))
        last = (lead + i % INNER) % TILES if SYMMETRIC else i % INNER
        b_outer = outer(b_lead, y_tiles.index(last).load(gl.SliceLayout(1, L3)), LEFT)
        acc = multiply_step(acc, b_outer, b_before, b_desc, row, first_step + i, ring, bars, STEPS)
        b_before = b_outer
    acc, _ = warpgroup_mma_wait(0, deps=[acc, b_before])
    return acc


@gluon.jit
def multiply_tail(
    acc,
    x_tiles,
    b_desc,
    row,
    first_step,
    ring,
    bars,
    HALF: gl.constexpr,
    STEPS: gl.constexpr,
    L3: gl.constexpr,
    LEFT: gl.constexpr,
):
    """Add the steps of the pairs (a, a + HALF), a < HALF, to acc. No product is under way before or after."""
    b_before = gl.zeros([acc.shape[0], STEP], x_tiles.dtype, LEFT)
    for i in gl.static_range(HALF):
        b_lead = x_tiles.index(i).load(gl.SliceLayout(2, L3))
        b_outer = outer(b_lead, x_tiles.index(i + HALF).load(gl.SliceLayout(1, L3)), LEFT)
        acc = multiply_step(acc, b_outer, b_before, b_desc, row, first_step + i, ring, bars, STEPS)
        b_before = b_outer
    acc, _ = warpgroup_mma_wait(0, deps=[acc, b_before])
    return acc


@gluon.jit
def expand_kernel(
    b_desc,
    p_x,
    p_y,
    p_log_g_cumsum,
    p_chunks,
    p_part,
    s_xt,
    s_xh,
    s_yt,
    s_yh,
    groups,
    token_blocks,
    power_scale,
    DIM_X: gl.constexpr,
    DIM_Y: gl.constexpr,
    DIM: gl.constexpr,
    TILES_X: gl.constexpr,
    TILES_Y: gl.constexpr,
    N: gl.constexpr,
    REPEATS: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    SYMMETRIC: gl.constexpr,
    OF_KEYS: gl.constexpr,
    GATED: gl.constexpr,
    HAS_START: gl.constexpr,
):
    """Compute the part of a state in one result for BM tokens of one head. Grid: slots heads token_blocks programs.

    b: [slots G STEPS 64, N] bf16 in, by descriptor, tiles [64, N].
    x: [tokens, heads, DIM_X] in. y: [tokens, heads, DIM_Y] in; not read where SYMMETRIC, where y is x.
    log_g_cumsum: [tokens, G] float32 in, where GATED.
    chunks: [slots, 4] int64 in.
    part: [tokens, heads, DIM] float32 out: the sum over steps, times power_scale and the decay between the state and
        the token. Not written for tokens of a chunk that has no state.
    REPEATS: heads of a group in x. TILES_X, TILES_Y: tiles of x and y, a power of two; SYMMETRIC takes TILES_X.
    N: columns of a tile of b, at least DIM.
    OF_KEYS: x are keys, which the state after the chunk acts on with exp(a_M - a_t); else queries, which the one before
        the chunk acts on with exp(a_t).
    HAS_START: whether the sequence's first chunk (OF_KEYS: its last) has such a state, too.
    """
    INNER: gl.constexpr = TILES_X // 2 if SYMMETRIC else TILES_Y
    TAIL: gl.constexpr = TILES_X // 2 if SYMMETRIC else 0
    STEPS: gl.constexpr = TILES_X * INNER + TAIL
    LEADS: gl.constexpr = (UNROLL // INNER) if INNER < UNROLL else 1
    WARPS: gl.constexpr = gl.num_warps()
    L3: gl.constexpr = rows_layout(BM, WARPS)
    SUMS: gl.constexpr = sums_layout(N, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    TILES_IN_SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])

    i_program = gl.program_id(0)
    i_block = i_program % token_blocks
    i_repeat = (i_program // token_blocks) % REPEATS
    i_group = (i_program // (token_blocks * REPEATS)) % groups
    i_chunk = i_program // (token_blocks * REPEATS * groups)
    i_head = i_group * REPEATS + i_repeat
    start = gl.load(p_chunks + i_chunk * 4)
    stop = gl.load(p_chunks + i_chunk * 4 + 1)
    first = start + i_block * BM
    is_edge = gl.load(p_chunks + i_chunk * 4 + (3 if OF_KEYS else 2))
    has_state = is_edge == 0
    if HAS_START:
        has_state = is_edge >= 0
    if (first < stop) & has_state:
        # The ring fills while the tiles of x and y are made.
        ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, STEP, N], b_desc.layout)
        bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i_stage in gl.static_range(STAGES):
            mbarrier.init(bars.index(i_stage), 1)
        # The unit that copies tiles sees shared memory through another proxy: without the fence it may meet barriers as
        # they were before.
        fence_async_shared()
        all_threads()
        row = (i_chunk * groups + i_group) * (STEPS * STEP)
        for i_step in gl.static_range(STAGES - 1):
            load_ring_tile(b_desc, row, i_step, ring, bars, STEPS)
        o_t = first + gl.arange(0, BM, gl.SliceLayout(1, LOAD))
        m_t = o_t < stop
        x_tiles = gl.allocate_shared_memory(p_x.dtype.element_ty, [TILES_X, BM, TILE], TILES_IN_SHARED)
        store_tiles(p_x + i_head.to(gl.int64) * s_xh, s_xt, o_t, m_t, x_tiles, DIM_X, TILES_X, LOAD)
        y_tiles = x_tiles
        if not SYMMETRIC:
            y_tiles = gl.allocate_shared_memory(p_x.dtype.element_ty, [TILES_Y, BM, TILE], TILES_IN_SHARED)
            p_head = p_y + i_head.to(gl.int64) * s_yh
            store_tiles(p_head, s_yt, o_t, m_t, y_tiles, DIM_Y, TILES_Y, LOAD)
        all_threads()

        acc = gl.zeros([BM, N], gl.float32, SUMS)
        for i_round in range(TILES_X // LEADS):
            acc = multiply_round(
                acc, x_tiles, y_tiles, b_desc, row, i_round * LEADS, i_round * (LEADS * INNER), ring, bars,
                LEADS, INNER, TILES_X, SYMMETRIC, STEPS, L3, LEFT,
            )  # fmt: skip
        if SYMMETRIC:
            acc = multiply_tail(
                acc, x_tiles, b_desc, row, TILES_X * INNER, ring, bars, TAIL, STEPS, L3, LEFT
            )  # fmt: skip

        # Decay and store.
        o_row = first + gl.arange(0, BM, ROW)
        m_row = o_row < stop
        b_decay = gl.full([BM], 1.0, gl.float32, ROW) * power_scale
        if GATED:
            b_cumsum = gl.load(p_log_g_cumsum + o_row * groups + i_group, mask=m_row, other=0.0)
            if OF_KEYS:
                b_cumsum = gl.load(p_log_g_cumsum + (stop - 1) * groups + i_group) - b_cumsum
            b_decay = b_decay * gl.exp(b_cumsum)
        o_n = gl.arange(0, N, gl.SliceLayout(0, SUMS))
        o_part = gl.expand_dims((o_row * (groups * REPEATS) + i_head) * DIM, 1) + gl.expand_dims(o_n, 0)
        m_part = gl.expand_dims(m_row, 1) & gl.expand_dims(o_n < DIM, 0)
        gl.store(p_part + o_part, acc * gl.expand_dims(b_decay, 1), mask=m_part)
