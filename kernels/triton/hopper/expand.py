"""phi(x) times a state: the state's part of out, and of dv. Legend: ../prologue.py.

A step of phi is an outer product of two tiles of 8 features. It is made in registers, in the layout of wgmma's left
operand, and so never in memory; the state's [64, V] tiles come by TMA into a ring. Steps are in the order of layout.py:
every lead tile has as many, so that the loop over them is unrolled and the one over lead tiles is not.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from powerplan.kernels.triton.hopper.gluon import all_threads, gl
from powerplan.kernels.triton.hopper.layouts import STEP, TILE, rows_layout, sums_layout
from powerplan.kernels.triton.hopper.ring import (
    load_ring_tile,
    new_barriers,
    state_decay,
    store_tiles,
    wait_ring_tile,
)
from powerplan.kernels.triton.hopper.within import owned_rows, rows_and_columns, state_at

UNROLL = gl.constexpr(8)
"""Steps between two points where no product is under way."""


@gluon.jit
def outer(b_lead, b_last, LEFT: gl.constexpr):
    """[rows, 8] x [rows, 8] -> [rows, 64], the left operand of a product; moves nothing between threads."""
    products = gl.expand_dims(b_lead, 2) * gl.expand_dims(b_last, 1)
    return gl.convert_layout(gl.reshape(products, [b_lead.shape[0], STEP]), LEFT, assert_trivial=True)


@gluon.jit
def multiply_step(acc, b_outer, b_before, desc, row, step, ring, bars, STEPS: gl.constexpr):
    """Add a step's product to acc, and wait for that of the step before.

    The left operand of a product under way is in registers that nobody may write to. It is handed to the wait that
    completes the product, which keeps these registers.
    """
    acc = warpgroup_mma(b_outer, wait_ring_tile(step, ring, bars), acc, is_async=True)
    acc, b_before = warpgroup_mma_wait(1, deps=[acc, b_before])
    # The product of the step before is complete, and its place in the ring free.
    load_ring_tile(desc, row, step + ring.shape[0] - 1, ring, bars, STEPS)
    return acc


@gluon.jit
def expand_kernel(
    state_desc,
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
    V: gl.constexpr,
    TILES: gl.constexpr,
    COLUMNS: gl.constexpr,
    REPEATS: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    OF_KEYS: gl.constexpr,
    GATED: gl.constexpr,
    HAS_START: gl.constexpr,
):
    """Compute phi(x) S for BM tokens of one head, p = 2. Grid: slots heads token_blocks programs.

    state: [slots G rows, COLUMNS] bf16 in, by descriptor, tiles [64, COLUMNS]: the state before each chunk; OF_KEYS its
        gradient after the chunk.
    x: [tokens, heads, K] in, queries; OF_KEYS keys.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED. chunks: [slots, 4] int64 in.
    part: [tokens, heads, V] bf16 out: the product, times power_scale and the decay between the state and the token. Not
        written for chunks that have no state.
    TILES: tiles of x, even. COLUMNS: V, padded. REPEATS: heads of a group in x.
    HAS_START: whether the sequence's first chunk (OF_KEYS: its last) has such a state, too.
    """
    HALF: gl.constexpr = TILES // 2
    STEPS: gl.constexpr = (TILES + 1) * HALF
    LEADS: gl.constexpr = (UNROLL // HALF) if HALF < UNROLL else 1
    WARPS: gl.constexpr = gl.num_warps()
    L3: gl.constexpr = rows_layout(BM, WARPS)
    LEAD: gl.constexpr = gl.SliceLayout(2, L3)
    LAST: gl.constexpr = gl.SliceLayout(1, L3)
    SUMS: gl.constexpr = sums_layout(COLUMNS, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    i_chunk, _, stop, i_group, i_head, first = owned_rows(p_chunks, groups, token_blocks, BM, REPEATS)
    if (first < stop) & state_at(p_chunks, i_chunk, 3 if OF_KEYS else 2, HAS_START):
        # The ring fills while the tiles of x are made.
        ring = gl.allocate_shared_memory(state_desc.dtype, [STAGES, STEP, COLUMNS], state_desc.layout)
        bars = new_barriers(STAGES)
        row = (i_chunk * groups + i_group) * (STEPS * STEP)
        for i in gl.static_range(STAGES - 1):
            load_ring_tile(state_desc, row, i, ring, bars, STEPS)
        x_tiles = gl.allocate_shared_memory(
            p_x.dtype.element_ty, [TILES, BM, TILE], gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
        )
        store_tiles(p_x + i_head.to(gl.int64) * s_xh, s_xt, first, stop, x_tiles, K, TILES, BM, WARPS)
        all_threads()

        acc = gl.zeros([BM, COLUMNS], gl.float32, SUMS)
        for i_round in range(TILES // LEADS):
            # No product is under way from one iteration to the next: a loop reuses the registers of its body, where a
            # left operand would lie that is still read.
            b_before = gl.zeros([BM, STEP], x_tiles.dtype, LEFT)
            for i in gl.static_range(LEADS * HALF):
                lead = i_round * LEADS + i // HALF
                if i % HALF == 0:
                    b_lead = x_tiles.index(lead).load(LEAD)
                b_outer = outer(b_lead, x_tiles.index((lead + i % HALF) % TILES).load(LAST), LEFT)
                step = i_round * (LEADS * HALF) + i
                acc = multiply_step(acc, b_outer, b_before, state_desc, row, step, ring, bars, STEPS)
                b_before = b_outer
            acc, b_before = warpgroup_mma_wait(0, deps=[acc, b_before])
        # The pairs (a, a + HALF).
        b_before = gl.zeros([BM, STEP], x_tiles.dtype, LEFT)
        for i in gl.static_range(HALF):
            b_outer = outer(x_tiles.index(i).load(LEAD), x_tiles.index(i + HALF).load(LAST), LEFT)
            acc = multiply_step(acc, b_outer, b_before, state_desc, row, TILES * HALF + i, ring, bars, STEPS)
            b_before = b_outer
        acc, b_before = warpgroup_mma_wait(0, deps=[acc, b_before])

        o_row = first + gl.arange(0, BM, gl.SliceLayout(1, SUMS))
        b_decay = state_decay(p_log_g_cumsum, o_row, stop, groups, i_group, power_scale, OF_KEYS, GATED)
        o_part, m_part = rows_and_columns(first, stop, groups * REPEATS, i_head, BM, COLUMNS, V, SUMS)
        b_part = (acc * gl.expand_dims(b_decay, 1)).to(p_part.dtype.element_ty)
        gl.store(p_part + o_part, b_part, mask=m_part)
