"""The output: what the state adds to each block of queries, and attention within the chunk. Legend: ../prologue.py."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from powerplan.kernels.triton.hopper.gluon import copy_tile, gl
from powerplan.kernels.triton.hopper.layouts import sums_layout
from powerplan.kernels.triton.hopper.ring import new_barriers
from powerplan.kernels.triton.hopper.within import (
    LOG2E,
    anew,
    copy_pair,
    decays,
    divisor,
    key_columns,
    load_gate,
    load_reference,
    new_columns,
    owned_rows,
    power,
    rows_and_columns,
    state_at,
    whole_state,
)


@gluon.jit
def output_kernel(
    q_desc,
    k_desc,
    v_desc,
    state_desc,
    p_log_g_cumsum,
    p_chunks,
    p_part,
    p_out,
    p_norm,
    groups,
    token_blocks,
    power_scale,
    p_norm_part,
    P: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    DIM: gl.constexpr,
    REPEATS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    NORMALIZE: gl.constexpr,
    HAS_START: gl.constexpr,
    HAS_STATES: gl.constexpr,
):
    """Compute the output for BM queries of one head. Grid: slots H token_blocks programs.

    q: [tokens, H K], k: [tokens, G K], v: [tokens, G V] bf16 in, by descriptor, tiles of BM, BN and BN rows of a head.
    state: bf16 in, by descriptor, where HAS_STATES: for P = 1 S before each chunk, [slots G K, V]; for P = 2 and
        NORMALIZE Z = sum k k^T, [slots G K, K].
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED. chunks: [slots, 4] int64 in.
    part: [tokens, H, DIM] bf16 in, where HAS_STATES and P > 1: the state's part of the sums (expand.py), for chunks
        that have a state before them.
    norm_part: [tokens, H] float32 in, where HAS_STATES, NORMALIZE and P > 2: likewise, of norm.
    out: [tokens, H, DIM] bf16 out. norm: [tokens, H] float32 out, where NORMALIZE.
    P: 1 to 4. K, V: head dims, padded; DIM: that of out. BM: a multiple of BN.
    HAS_START: whether the first chunk of a sequence has a state before it. HAS_STATES: whether any has.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = sums_layout(BN, WARPS)
    SUMS: gl.constexpr = sums_layout(V, WARPS)
    SQUARES: gl.constexpr = sums_layout(K, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    i_chunk, start, stop, i_group, i_head, first = owned_rows(p_chunks, groups, token_blocks, BM, REPEATS)
    if first < stop:
        has_state = state_at(p_chunks, i_chunk, 2, HAS_START)
        q_tile = gl.allocate_shared_memory(q_desc.dtype, [BM, K], q_desc.layout)
        k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, K], k_desc.layout)
        v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, V], v_desc.layout)
        bars = new_barriers(STAGES + 2)
        q_bar = bars.index(STAGES)
        mbarrier.expect(q_bar, BM * K * 2)
        copy_tile(q_desc, [first, i_head * K], q_bar, q_tile)
        count = (gl.minimum(first + BM, stop) - start + BN - 1) // BN
        whole = (first - start) // BN
        for i in gl.static_range(STAGES - 1):
            copy_pair(
                k_desc, v_desc, start + i * BN, i_group * K, i_group * V, k_ring, v_ring, bars, i, i < count
            )  # fmt: skip

        o_row = first + gl.arange(0, BM, ROW)
        o_column = start + gl.arange(0, BN, COLUMN)
        m_row = o_row < stop
        # The reference of decays is the last key before the block.
        word, rest = load_reference(p_log_g_cumsum, gl.maximum(first - 1, start), groups, i_group, GATED)
        b_gate = load_gate(p_log_g_cumsum, o_row, stop, word, rest, groups, i_group, GATED)
        b_factor = gl.exp2(gl.where(first > start, b_gate, 0.0)) * power_scale
        b_norm = gl.zeros([BM], gl.float32, ROW)
        acc = gl.zeros([BM, V], gl.float32, SUMS)
        none = gl.zeros([BM, BN], gl.float32, SCORES)
        mbarrier.wait(q_bar, 0)
        if HAS_STATES:
            if P == 1:
                if has_state:
                    state = whole_state(state_desc, i_chunk, groups, i_group, bars, K, V)
                    acc = warpgroup_mma(q_tile, state, acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    b_since = gl.exp2(b_gate + word * LOG2E) * power_scale
                    acc = acc * gl.expand_dims(gl.convert_layout(b_since, gl.SliceLayout(1, SUMS)), 1)
            else:
                o_out, m_out = rows_and_columns(first, stop, groups * REPEATS, i_head, BM, V, DIM, SUMS)
                acc = gl.load(p_part + o_out, mask=m_out & has_state, other=0.0).to(gl.float32)
            if NORMALIZE:
                if P == 2:
                    if has_state:
                        # q^T Z q, by a product with Z: K multiply-adds a query remain outside the matrix unit.
                        square = whole_state(state_desc, i_chunk, groups, i_group, bars, K, K)
                        b_qz = warpgroup_mma(q_tile, square, gl.zeros([BM, K], gl.float32, SQUARES), is_async=True)
                        b_qz = warpgroup_mma_wait(0, deps=[b_qz])
                        b_sum = gl.sum(b_qz * q_tile.load(SQUARES).to(gl.float32), 1)
                        b_since = gl.exp2(b_gate + word * LOG2E) * power_scale
                        b_norm = gl.convert_layout(b_sum, ROW) * b_since
                else:
                    o_query = o_row.to(gl.int64) * (groups * REPEATS) + i_head
                    b_norm = gl.load(p_norm_part + o_query, mask=m_row & has_state, other=0.0)

        columns = new_columns(2, BN)
        for i in gl.static_range(2):
            b_ahead = key_columns(
                p_log_g_cumsum, start + i * BN, stop, word, rest, i < whole, groups, i_group, BN, GATED
            )
            columns.index(i).store(b_ahead)
        for i in range(count):
            slot = i % STAGES
            ahead = i + STAGES - 1
            o_s = o_column + i * BN
            b_columns = columns.index(i % 2).load(COLUMN)
            b_ahead = key_columns(
                p_log_g_cumsum, start + (i + 2) * BN, stop, word, rest, i + 2 < whole, groups, i_group, BN, GATED
            )  # fmt: skip
            mbarrier.wait(bars.index(slot), (i // STAGES) & 1)
            b_s = warpgroup_mma(q_tile, k_ring.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            # The products of the block before are complete, and its place in the rings free.
            copy_pair(
                k_desc, v_desc, start + ahead * BN, i_group * K, i_group * V, k_ring, v_ring, bars, ahead % STAGES,
                ahead < count,
            )  # fmt: skip
            columns.index(i % 2).store(b_ahead)
            b_w = power(b_s, P) * decays(b_gate, b_factor, b_columns, o_row, o_s, i < whole, power_scale, False)
            if NORMALIZE:
                b_norm += gl.sum(b_w, 1)
            b_left = gl.convert_layout(b_w.to(k_desc.dtype), LEFT)
            acc = warpgroup_mma(b_left, v_ring.index(slot), acc, is_async=True)
            acc, b_left = warpgroup_mma_wait(0, deps=[acc, b_left])

        o_out, m_out = rows_and_columns(anew(first), stop, groups * REPEATS, i_head, BM, V, DIM, SUMS)
        if NORMALIZE:
            gl.store(p_norm + (o_row.to(gl.int64) * (groups * REPEATS) + i_head), b_norm, mask=m_row)
            b_inverse = 1.0 / divisor(b_norm)
            acc = acc * gl.expand_dims(gl.convert_layout(b_inverse, gl.SliceLayout(1, SUMS)), 1)
        gl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=m_out)
