"""Sums of phi(x) y^T over each chunk, all chunks at once: what the chunk's tokens add to the state.

A program owns SHARE steps of phi, 64 SHARE rows, and walks the chunk's tokens, 64 at a time. Time is the inner dim of
its products: the left operand is an outer product of two tiles of x^T, made in registers, and y is the right one. Both
come by TMA from copies that prepare.py has made: x with time last, y times all that multiplies a token. The steps of a
program share their lead tile, which is read from shared memory once for all of them: that reading, and not the matrix
unit, is what limits this kernel.

The running sum over chunks is another kernel's (running.py). Legend: ../prologue.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from powerplan.kernels.triton.hopper.gluon import all_threads, copy_tile, gl, viewed
from powerplan.kernels.triton.hopper.layouts import STEP, TILE, sums_layout, time_layout


@gluon.jit
def load_block(
    xt_desc, y_desc, x_row, y_row, t, leads, lasts, slot, x_ring, y_ring, bars, wanted, TILES: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Start the copies of one block of tokens into place `slot` of the rings: TILES tiles of x, and y.

    WHOLE: all tiles of x, by one copy; else the lead tiles and the last tiles, one by one.
    """
    BT: gl.constexpr = y_ring.shape[1]
    mbarrier.expect(bars.index(slot), (TILES * TILE + y_ring.shape[2]) * BT * 2, pred=wanted)
    if WHOLE:
        blocks = viewed(x_ring, y_ring.shape[0], TILES * TILE, BT)
        copy_tile(xt_desc, [x_row, t], bars.index(slot), blocks.index(slot), pred=wanted)
    else:
        tiles = leads + lasts
        for i in gl.static_range(TILES):
            place = x_ring.index(slot * TILES + i)
            copy_tile(xt_desc, [x_row + tiles[i] * TILE, t], bars.index(slot), place, pred=wanted)
    copy_tile(y_desc, [y_row + t, 0], bars.index(slot), y_ring.index(slot), pred=wanted)


@gluon.jit
def sum_chunk(
    xt_desc,
    y_desc,
    p_part,
    leads,
    lasts,
    first_head,
    length,
    chunk,
    REPEATS: gl.constexpr,
    TILES_X: gl.constexpr,
    V: gl.constexpr,
    SHARE: gl.constexpr,
    BT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sum SHARE steps over the first `length` tokens of a chunk and all heads of its group; leads: one, or SHARE."""
    LEADS: gl.constexpr = len(leads)
    # Up to head dim 64 all tiles of x come at once: each copy costs a program some 50 cycles and two barriers.
    WHOLE: gl.constexpr = TILES_X <= 8
    TILES: gl.constexpr = TILES_X if WHOLE else LEADS + SHARE
    L3: gl.constexpr = time_layout(BT)
    SUMS: gl.constexpr = sums_layout(V, 4)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    x_ring = gl.allocate_shared_memory(xt_desc.dtype, [STAGES * TILES, TILE, BT], xt_desc.layout)
    y_ring = gl.allocate_shared_memory(y_desc.dtype, [STAGES, BT, V], y_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i_stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(i_stage), 1)
    fence_async_shared()
    all_threads()
    blocks = (length + BT - 1) // BT
    total = blocks * REPEATS
    for i in gl.static_range(STAGES - 1):
        head = first_head + i // gl.maximum(blocks, 1)
        t = i % gl.maximum(blocks, 1) * BT
        wanted = i < total
        load_block(
            xt_desc, y_desc, head * (TILES_X * TILE), head * chunk, t, leads, lasts, i, x_ring, y_ring, bars, wanted,
            TILES, WHOLE,
        )  # fmt: skip
    accs = ()
    for i in gl.static_range(SHARE):
        accs = accs + (gl.zeros([STEP, V], gl.float32, SUMS),)
    for i_block in range(total):
        slot = i_block % STAGES
        mbarrier.wait(bars.index(slot), (i_block // STAGES) & 1)
        y = y_ring.index(slot)
        new = ()
        kept = ()
        for i in gl.static_range(SHARE):
            if (i == 0) or (LEADS > 1):
                b_lead = x_ring.index(slot * TILES + (leads[i] if WHOLE else i)).load(gl.SliceLayout(1, L3))
            b_last = x_ring.index(slot * TILES + (lasts[i] if WHOLE else LEADS + i)).load(gl.SliceLayout(0, L3))
            products = gl.expand_dims(b_lead, 1) * gl.expand_dims(b_last, 0)
            b_phi = gl.convert_layout(gl.reshape(products, [STEP, BT]), LEFT, assert_trivial=True)
            new = new + (warpgroup_mma(b_phi, y, accs[i], is_async=True),)
            kept = kept + (b_phi,)
        # The left operands stay in registers until all products are complete.
        done = warpgroup_mma_wait(0, deps=new + kept)
        accs = ()
        for i in gl.static_range(SHARE):
            accs = accs + (done[i],)
        following = i_block + STAGES - 1
        head = first_head + following // blocks
        t = following % blocks * BT
        load_block(
            xt_desc, y_desc, head * (TILES_X * TILE), head * chunk, t, leads, lasts, following % STAGES, x_ring, y_ring,
            bars, following < total, TILES, WHOLE,
        )  # fmt: skip
    o_row = gl.arange(0, STEP, gl.SliceLayout(1, SUMS))
    o_v = gl.arange(0, V, gl.SliceLayout(0, SUMS))
    p_out = p_part + gl.expand_dims(o_row * V, 1) + gl.expand_dims(o_v, 0)
    for i in gl.static_range(SHARE):
        gl.store(p_out + i * (STEP * V), accs[i].to(p_part.dtype.element_ty))


@gluon.jit
def states_kernel(
    xt_desc,
    y_desc,
    p_chunks,
    p_parts,
    groups,
    chunk,
    REPEATS: gl.constexpr,
    TILES_X: gl.constexpr,
    V: gl.constexpr,
    SHARE: gl.constexpr,
    BT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sum phi(x) y^T over each chunk. Grid: slots G (STEPS / SHARE) programs of 4 warps.

    xt: [slots heads 8 TILES_X, chunk] bf16 in, by descriptor, tiles [8, BT]; [8 TILES_X, BT] for TILES_X up to 8.
    y: [slots heads chunk, V] bf16 in, by descriptor, tiles [BT, V]; 0 for tokens past the chunk's end.
    chunks: [slots, 4] int64 in.
    parts: [slots, G, STEPS 64, V] bf16 out. Zeros for a slot without tokens.
    chunk: tokens of a slot in xt and y, a multiple of BT. REPEATS: heads of a group. SHARE: divides TILES_X / 2.
    """
    HALF: gl.constexpr = TILES_X // 2
    OF_LEAD: gl.constexpr = HALF // SHARE
    PROGRAMS: gl.constexpr = (TILES_X + 1) * OF_LEAD
    i_program = gl.program_id(0)
    i_own = i_program % PROGRAMS
    i_state = i_program // PROGRAMS
    i_chunk = i_state // groups
    length = (gl.load(p_chunks + i_chunk * 4 + 1) - gl.load(p_chunks + i_chunk * 4)).to(gl.int32)
    # Steps in the order of layout.py: HALF for each lead tile, then the pairs (a, a + HALF).
    p_part = p_parts + (i_state.to(gl.int64) * PROGRAMS + i_own) * (SHARE * STEP * V)
    lead = i_own // OF_LEAD
    first = i_own % OF_LEAD * SHARE
    if lead < TILES_X:
        lasts = ()
        for i in gl.static_range(SHARE):
            lasts = lasts + ((lead + first + i) % TILES_X,)
        sum_chunk(
            xt_desc, y_desc, p_part, (lead,), lasts, i_state * REPEATS, length, chunk, REPEATS, TILES_X, V, SHARE, BT,
            STAGES,
        )  # fmt: skip
    else:
        leads = ()
        lasts = ()
        for i in gl.static_range(SHARE):
            leads = leads + (first + i,)
            lasts = lasts + (first + i + HALF,)
        sum_chunk(
            xt_desc, y_desc, p_part, leads, lasts, i_state * REPEATS, length, chunk, REPEATS, TILES_X, V, SHARE, BT,
            STAGES,
        )  # fmt: skip
