"""phi(x) times a state for p = 3 and 4: the state's part of out, and of dv. Legend: ../prologue.py.

As expand.py, but a step of phi has one or two fixed features beside its tiles. They multiply the last tile, of which a
thread holds two features, and not the lead tile, of which it holds eight. Steps are in the order of layout.py: the
eight features of a fixed tile follow each other, and are the unrolled steps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from powerplan.kernels.triton.hopper.expand import multiply_step, outer
from powerplan.kernels.triton.hopper.fixed_tiles import ROW, outer_features, store_rows, tile_of
from powerplan.kernels.triton.hopper.gluon import all_threads, gl
from powerplan.kernels.triton.hopper.layouts import STEP, TILE, rows_layout, sums_layout
from powerplan.kernels.triton.hopper.ring import load_ring_tile, new_barriers, state_decay
from powerplan.kernels.triton.hopper.within import owned_rows, rows_and_columns, state_at


@gluon.jit
def fixed_expand_kernel(
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
    P: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    TILES: gl.constexpr,
    STEPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    REPEATS: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    OF_KEYS: gl.constexpr,
    GATED: gl.constexpr,
    HAS_START: gl.constexpr,
):
    """Compute phi(x) S for BM tokens of one head, p = 3 or 4. Grid: slots heads token_blocks programs.

    state, x, log_g_cumsum, chunks, part: as in expand_kernel. part: bf16 or float32.
    TILES: tiles of x, the last one perhaps in part. STEPS: steps of phi. COLUMNS: V, padded. REPEATS: heads of a group
        in x.
    HAS_START: whether the sequence's first chunk (OF_KEYS: its last) has such a state, too.
    """
    WARPS: gl.constexpr = gl.num_warps()
    L3: gl.constexpr = rows_layout(BM, WARPS)
    LAST: gl.constexpr = gl.SliceLayout(1, L3)
    COLUMN: gl.constexpr = gl.SliceLayout(1, LAST)
    SUMS: gl.constexpr = sums_layout(COLUMNS, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    i_chunk, _, stop, i_group, i_head, first = owned_rows(p_chunks, groups, token_blocks, BM, REPEATS)
    if (first < stop) & state_at(p_chunks, i_chunk, 3 if OF_KEYS else 2, HAS_START):
        ring = gl.allocate_shared_memory(state_desc.dtype, [STAGES, STEP, COLUMNS], state_desc.layout)
        bars = new_barriers(STAGES)
        row = (i_chunk * groups + i_group) * (STEPS * STEP)
        for i in gl.static_range(STAGES - 1):
            load_ring_tile(state_desc, row, i, ring, bars, STEPS)
        x_rows = gl.allocate_shared_memory(p_x.dtype.element_ty, [TILES * TILE, BM], ROW)
        store_rows(p_x + i_head.to(gl.int64) * s_xh, s_xt, first, stop, x_rows, K, TILES, WARPS)
        all_threads()

        acc = gl.zeros([BM, COLUMNS], gl.float32, SUMS)
        step = first * 0
        for lead in range(TILES):
            b_lead = tile_of(x_rows, lead, TILES).load(gl.SliceLayout(2, L3))
            for inner in range(lead + 1):
                for last in range(lead, TILES):
                    b_last = tile_of(x_rows, last, TILES).load(LAST)
                    for i_outer in range(outer_features(inner, P)):
                        if P == 4:
                            b_outer_feature = x_rows.index(i_outer).load(COLUMN).to(gl.float32)
                        # No product is under way from one iteration to the next, as in expand.py.
                        b_before = gl.zeros([BM, STEP], x_rows.dtype, LEFT)
                        for i in gl.static_range(TILE):
                            b_fixed = x_rows.index(inner * TILE + i).load(COLUMN)
                            if P == 4:
                                b_fixed = (b_fixed.to(gl.float32) * b_outer_feature).to(x_rows.dtype)
                            b_outer = outer(b_lead, b_last * gl.expand_dims(b_fixed, 1), LEFT)
                            acc = multiply_step(acc, b_outer, b_before, state_desc, row, step + i, ring, bars, STEPS)
                            b_before = b_outer
                        acc, b_before = warpgroup_mma_wait(0, deps=[acc, b_before])
                        step += TILE

        o_row = first + gl.arange(0, BM, gl.SliceLayout(1, SUMS))
        b_decay = state_decay(p_log_g_cumsum, o_row, stop, groups, i_group, power_scale, OF_KEYS, GATED)
        o_part, m_part = rows_and_columns(first, stop, groups * REPEATS, i_head, BM, COLUMNS, V, SUMS)
        b_part = (acc * gl.expand_dims(b_decay, 1)).to(p_part.dtype.element_ty)
        gl.store(p_part + o_part, b_part, mask=m_part)
