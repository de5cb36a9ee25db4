"""Sums of phi(x) y^T over each chunk for p = 3 and 4, all chunks at once. Legend: ../prologue.py.

As states.py, but a step of phi has one or two fixed features beside its tiles. A program owns SHARE steps that differ
in their last fixed feature alone: both tiles are read from shared memory once for all of them. The rows of fixed
features, for p = 4 the products of two, come through registers: a row of a tile that TMA has swizzled can not be read
by an index that is known at run time only.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from powerplan.kernels.triton.hopper.gluon import copy_tile, gl, viewed
from powerplan.kernels.triton.hopper.layouts import STEP, TILE, sums_layout, time_layout
from powerplan.kernels.triton.hopper.ring import new_barriers


@gluon.jit
def place(i_block, blocks, REPEATS: gl.constexpr):
    """Return the head of the group and the block of its tokens for the block `i_block` of a walk over all of them."""
    i_head = i_block * 0
    i_own = i_block
    if REPEATS > 1:
        i_head = i_block // gl.maximum(blocks, 1)
        i_own = i_block % gl.maximum(blocks, 1)
    return i_head, i_own


@gluon.jit
def load_tokens(xt_desc, y_desc, x_row, y_row, t, slot, x_ring, y_ring, bars, wanted):
    """Start the copies of one block of tokens into place `slot` of the rings: all tiles of x, and y."""
    STAGES: gl.constexpr = y_ring.shape[0]
    BT: gl.constexpr = y_ring.shape[1]
    WIDTH: gl.constexpr = x_ring.shape[0] // STAGES * TILE
    mbarrier.expect(bars.index(slot), (WIDTH + y_ring.shape[2]) * BT * 2, pred=wanted)
    blocks = viewed(x_ring, STAGES, WIDTH, BT)
    copy_tile(xt_desc, [x_row, t], bars.index(slot), blocks.index(slot), pred=wanted)
    copy_tile(y_desc, [y_row + t, 0], bars.index(slot), y_ring.index(slot), pred=wanted)


@gluon.jit
def load_fixed(p_head, p_step, t, chunk, P: gl.constexpr, SHARE: gl.constexpr, BT: gl.constexpr):
    """Return the products of the fixed features of SHARE steps, [SHARE BT], for BT tokens of a head."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    o_fixed = gl.arange(0, SHARE * BT, LAYOUT)
    o_t = t + o_fixed % BT
    b_fixed = gl.load(p_head + ((gl.load(p_step + P - 3) + o_fixed // BT) * chunk + o_t))
    if P == 4:
        b_outer = gl.load(p_head + (gl.load(p_step) * chunk + o_t))
        b_fixed = (b_fixed.to(gl.float32) * b_outer.to(gl.float32)).to(b_fixed.dtype)
    return b_fixed


@gluon.jit
def fixed_states_kernel(
    xt_desc,
    y_desc,
    p_xt,
    p_chunks,
    p_steps,
    p_parts,
    groups,
    chunk,
    P: gl.constexpr,
    REPEATS: gl.constexpr,
    TILES_X: gl.constexpr,
    V: gl.constexpr,
    STEPS: gl.constexpr,
    SHARE: gl.constexpr,
    BT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sum phi(x) y^T over each chunk, p = 3 or 4. Grid: slots G (STEPS / SHARE) programs of 4 warps.

    xt: [slots heads 8 TILES_X, chunk] bf16 in, twice: by descriptor, tiles [8 TILES_X, BT], and by its address.
    y: [slots heads chunk, V] bf16 in, by descriptor, tiles [BT, V]; 0 for tokens past the chunk's end.
    chunks: [slots, 4] int64 in. steps: [STEPS, P + 1] int32 in.
    parts: [slots, G, STEPS 64, V] bf16 out. Zeros for a slot without tokens.
    chunk: tokens of a slot in xt and y, a multiple of BT. REPEATS: heads of a group. SHARE: divides 8.
    """
    PROGRAMS: gl.constexpr = STEPS // SHARE
    L3: gl.constexpr = time_layout(BT)
    LAST: gl.constexpr = gl.SliceLayout(0, L3)
    SUMS: gl.constexpr = sums_layout(V, 4)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    i_program = gl.program_id(0)
    i_own = i_program % PROGRAMS
    i_state = i_program // PROGRAMS
    i_chunk = i_state // groups
    first_head = i_state * REPEATS
    length = (gl.load(p_chunks + i_chunk * 4 + 1) - gl.load(p_chunks + i_chunk * 4)).to(gl.int32)
    p_step = p_steps + i_own * (SHARE * (P + 1))
    lead = gl.load(p_step + P - 2) // TILE
    last = gl.load(p_step + P - 1) // TILE
    x_ring = gl.allocate_shared_memory(xt_desc.dtype, [STAGES * TILES_X, TILE, BT], xt_desc.layout)
    y_ring = gl.allocate_shared_memory(y_desc.dtype, [STAGES, BT, V], y_desc.layout)
    fixed = gl.allocate_shared_memory(xt_desc.dtype, [2, SHARE * BT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = new_barriers(STAGES)
    blocks = (length + BT - 1) // BT
    total = blocks * REPEATS
    for i in gl.static_range(STAGES - 1):
        i_head, i_own_block = place(gl.to_tensor(i), blocks, REPEATS)
        head = first_head + i_head
        t = i_own_block * BT
        load_tokens(xt_desc, y_desc, head * (TILES_X * TILE), head * chunk, t, i, x_ring, y_ring, bars, i < total)
    p_first = p_xt + first_head.to(gl.int64) * (TILES_X * TILE * chunk)
    b_next = load_fixed(p_first, p_step, 0, chunk, P, SHARE, BT)
    accs = ()
    for i in gl.static_range(SHARE):
        accs = accs + (gl.zeros([STEP, V], gl.float32, SUMS),)
    for i_block in range(total):
        slot = i_block % STAGES
        fixed.index(i_block % 2).store(b_next)
        # Loaded a block ahead. After the last block it is the last one's again: there may be nothing behind it.
        after = gl.minimum(i_block + 1, total - 1)
        i_head, i_own_block = place(after, blocks, REPEATS)
        p_head = p_first + i_head.to(gl.int64) * (TILES_X * TILE * chunk)
        b_next = load_fixed(p_head, p_step, i_own_block * BT, chunk, P, SHARE, BT)
        mbarrier.wait(bars.index(slot), (i_block // STAGES) & 1)
        y = y_ring.index(slot)
        b_lead = x_ring.index(slot * TILES_X + lead).load(gl.SliceLayout(1, L3))
        b_last = x_ring.index(slot * TILES_X + last).load(LAST)
        new = ()
        kept = ()
        for i in gl.static_range(SHARE):
            b_fixed = fixed.index(i_block % 2).slice(i * BT, BT).load(gl.SliceLayout(0, LAST))
            # Into the last tile, of which a thread holds half as many features as of the lead tile.
            b_scaled = b_last * gl.expand_dims(b_fixed, 0)
            products = gl.expand_dims(b_lead, 1) * gl.expand_dims(b_scaled, 0)
            b_phi = gl.convert_layout(gl.reshape(products, [STEP, BT]), LEFT, assert_trivial=True)
            new = new + (warpgroup_mma(b_phi, y, accs[i], is_async=True),)
            kept = kept + (b_phi,)
        # The left operands stay in registers until all products are complete.
        done = warpgroup_mma_wait(0, deps=new + kept)
        accs = ()
        for i in gl.static_range(SHARE):
            accs = accs + (done[i],)
        following = i_block + STAGES - 1
        i_head, i_own_block = place(following, blocks, REPEATS)
        head = first_head + i_head
        t = i_own_block * BT
        load_tokens(
            xt_desc, y_desc, head * (TILES_X * TILE), head * chunk, t, following % STAGES, x_ring, y_ring, bars,
            following < total,
        )  # fmt: skip
    o_row = gl.arange(0, STEP, gl.SliceLayout(1, SUMS))
    o_v = gl.arange(0, V, gl.SliceLayout(0, SUMS))
    p_part = p_parts + (i_state.to(gl.int64) * PROGRAMS + i_own) * (SHARE * STEP * V)
    p_out = p_part + gl.expand_dims(o_row * V, 1) + gl.expand_dims(o_v, 0)
    for i in gl.static_range(SHARE):
        gl.store(p_out + i * (STEP * V), accs[i].to(p_part.dtype.element_ty))
