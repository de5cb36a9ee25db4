"""The gradients of keys and values: through the state, and through the chunk's queries. Legend: ../prologue.py."""

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
    load_gate,
    load_reference,
    new_columns,
    owned_rows,
    power,
    query_columns,
    query_shares,
    rows_and_columns,
    state_at,
    whole_state,
)


@gluon.jit
def keys_kernel(
    k_desc,
    v_desc,
    q_desc,
    y_desc,
    state_desc,
    p_log_g_cumsum,
    p_grad_norm,
    p_chunks,
    p_part_k,
    p_part_v,
    p_dk,
    p_dv,
    p_k_dot_dk,
    groups,
    token_blocks,
    power_scale,
    P: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    DIM_K: gl.constexpr,
    DIM_V: gl.constexpr,
    REPEATS: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    NORMALIZE: gl.constexpr,
    HAS_START: gl.constexpr,
    HAS_STATES: gl.constexpr,
):
    """Compute dk and dv for BN keys of one key/value head. Grid: slots G token_blocks programs.

    With y the gradient of the sum of weighted values and u that of norm, a weight w gives w y to dv, and y.v + u is the
    gradient of w.

    k: [tokens, G K], v: [tokens, G V], q: [tokens, H K], y: [tokens, H V] bf16 in, by descriptor, tiles of BN and BM
        rows of a head.
    state: bf16 in, by descriptor, where HAS_STATES: for P = 1 the gradient of S after each chunk, [slots G K, V]; for
        P = 2 and NORMALIZE that of Z = sum k k^T, [slots G K, K].
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED. grad_norm: [tokens, H] float32 in, where NORMALIZE: u.
    chunks: [slots, 4] int64 in.
    part_k, part_v: [tokens, G, DIM_K] and [tokens, G, DIM_V] bf16 or float32 in, where HAS_STATES and P > 1: what
        comes back through the state (contract.py, expand.py), for P = 2 without the normaliser, for chunks that have a
        gradient of the state after them.
    dk: [tokens, G, DIM_K] bf16 out. dv: [tokens, G, DIM_V] bf16 out. k_dot_dk: [tokens, G] float32 out, where GATED.
    P: 1 to 4. K, V: head dims, padded. BN: a multiple of BM.
    HAS_START: whether the last chunk of a sequence has a gradient of the state after it. HAS_STATES: whether any has.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = sums_layout(BM, WARPS)
    OF_K: gl.constexpr = sums_layout(K, WARPS)
    OF_V: gl.constexpr = sums_layout(V, WARPS)
    LEFT_K: gl.constexpr = gl.DotOperandLayout(0, OF_K, 2)
    LEFT_V: gl.constexpr = gl.DotOperandLayout(0, OF_V, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    i_chunk, _, stop, i_group, _, first = owned_rows(p_chunks, groups, token_blocks, BN, 1)
    if first < stop:
        has_state = state_at(p_chunks, i_chunk, 3, HAS_START)
        k_tile = gl.allocate_shared_memory(k_desc.dtype, [BN, K], k_desc.layout)
        v_tile = gl.allocate_shared_memory(v_desc.dtype, [BN, V], v_desc.layout)
        q_ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BM, K], q_desc.layout)
        y_ring = gl.allocate_shared_memory(y_desc.dtype, [STAGES, BM, V], y_desc.layout)
        bars = new_barriers(STAGES + 2)
        own_bar = bars.index(STAGES)
        mbarrier.expect(own_bar, BN * (K + V) * 2)
        copy_tile(k_desc, [first, i_group * K], own_bar, k_tile)
        copy_tile(v_desc, [first, i_group * V], own_bar, v_tile)
        # Blocks of queries from the first of these keys on, those of one head after those of another.
        blocks = (stop - first + BM - 1) // BM
        count = blocks * REPEATS
        for i in gl.static_range(STAGES - 1):
            i_head = i_group * REPEATS + i // blocks
            copy_pair(
                q_desc, y_desc, first + i % blocks * BM, i_head * K, i_head * V, q_ring, y_ring, bars, i, i < count
            )  # fmt: skip

        o_row = first + gl.arange(0, BN, ROW)
        o_column = first + gl.arange(0, BM, COLUMN)
        m_row = o_row < stop
        # The reference of decays is the last of these keys, or of the chunk's.
        word, rest = load_reference(p_log_g_cumsum, gl.minimum(first + BN, stop) - 1, groups, i_group, GATED)
        b_gate = load_gate(p_log_g_cumsum, o_row, stop, word, rest, groups, i_group, GATED)
        end_word, end_rest = load_reference(p_log_g_cumsum, stop - 1, groups, i_group, GATED)
        left = ((end_word - word) + (end_rest - rest)) * LOG2E
        b_factor = gl.exp2(-b_gate) * power_scale
        # dk / P: the P of the derivative of s^P multiplies it at the end.
        dk = gl.zeros([BN, K], gl.float32, OF_K)
        dv = gl.zeros([BN, V], gl.float32, OF_V)
        none = gl.zeros([BN, BM], gl.float32, SCORES)
        mbarrier.wait(own_bar, 0)
        if HAS_STATES:
            if P == 1:
                if has_state:
                    state = whole_state(state_desc, i_chunk, groups, i_group, bars, K, V)
                    dk = warpgroup_mma(v_tile, state.permute((1, 0)), dk, is_async=True)
                    dv = warpgroup_mma(k_tile, state, dv, is_async=True)
                    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
                    b_to_end = gl.exp2(gl.where(m_row, left - b_gate, 0.0))
                    dk = dk * gl.expand_dims(gl.convert_layout(b_to_end, gl.SliceLayout(1, OF_K)), 1)
                    dv = dv * gl.expand_dims(gl.convert_layout(b_to_end, gl.SliceLayout(1, OF_V)), 1)
            else:
                o_dk, m_dk = rows_and_columns(first, stop, groups, i_group, BN, K, DIM_K, OF_K)
                o_dv, m_dv = rows_and_columns(first, stop, groups, i_group, BN, V, DIM_V, OF_V)
                dk = gl.load(p_part_k + o_dk, mask=m_dk & has_state, other=0.0).to(gl.float32) * (1.0 / P)
                dv = gl.load(p_part_v + o_dv, mask=m_dv & has_state, other=0.0).to(gl.float32)
            if NORMALIZE and P == 2:
                if has_state:
                    square = whole_state(state_desc, i_chunk, groups, i_group, bars, K, K)
                    b_kz = warpgroup_mma(k_tile, square, gl.zeros([BN, K], gl.float32, OF_K), is_async=True)
                    b_kz = warpgroup_mma_wait(0, deps=[b_kz])
                    b_to_end = gl.exp2(gl.where(m_row, left - b_gate, 0.0))
                    dk += b_kz * gl.expand_dims(gl.convert_layout(b_to_end, gl.SliceLayout(1, OF_K)), 1)

        heads = groups * REPEATS
        columns = new_columns(2, BM)
        shares = new_columns(2, BM)
        for i in gl.static_range(2):
            block = i % blocks * BM
            head = i_group * REPEATS + gl.minimum(i, count - 1) // blocks
            b_ahead = query_columns(
                p_log_g_cumsum, first + block, stop, word, rest, block >= BN, groups, i_group, BM, GATED
            )
            columns.index(i).store(b_ahead)
            shares.index(i).store(query_shares(p_grad_norm, first + block, stop, heads, head, BM, NORMALIZE))
        for i in range(count):
            slot = i % STAGES
            ahead = i + STAGES - 1
            copied_head = i_group * REPEATS + ahead // blocks
            i_block = i % blocks
            o_t = o_column + i_block * BM
            whole = i_block * BM >= BN
            b_columns = columns.index(i % 2).load(COLUMN)
            b_u = shares.index(i % 2).load(COLUMN)
            next_block = (i + 2) % blocks * BM
            next_head = i_group * REPEATS + gl.minimum(i + 2, count - 1) // blocks
            b_ahead = query_columns(
                p_log_g_cumsum, first + next_block, stop, word, rest, next_block >= BN, groups, i_group, BM, GATED
            )  # fmt: skip
            b_share = query_shares(p_grad_norm, first + next_block, stop, heads, next_head, BM, NORMALIZE)
            mbarrier.wait(bars.index(slot), (i // STAGES) & 1)
            b_s = warpgroup_mma(k_tile, q_ring.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
            b_dw = warpgroup_mma(v_tile, y_ring.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
            b_s, b_dw = warpgroup_mma_wait(0, deps=[b_s, b_dw])
            copy_pair(
                q_desc, y_desc, first + ahead % blocks * BM, copied_head * K, copied_head * V, q_ring, y_ring, bars,
                ahead % STAGES, ahead < count,
            )  # fmt: skip
            columns.index(i % 2).store(b_ahead)
            shares.index(i % 2).store(b_share)
            b_w = decays(b_gate, b_factor, b_columns, o_row, o_t, whole, power_scale, True)
            if P > 1:
                b_w = power(b_s, P - 1) * b_w
            b_left_k = gl.convert_layout(((b_dw + gl.expand_dims(b_u, 0)) * b_w).to(k_desc.dtype), LEFT_K)
            b_left_v = gl.convert_layout((b_s * b_w).to(k_desc.dtype), LEFT_V)
            dk = warpgroup_mma(b_left_k, q_ring.index(slot), dk, is_async=True)
            dv = warpgroup_mma(b_left_v, y_ring.index(slot), dv, is_async=True)
            dk, dv, b_left_k, b_left_v = warpgroup_mma_wait(0, deps=[dk, dv, b_left_k, b_left_v])

        dk = dk * (1.0 * P)
        # Computed anew: kept over the loop, the offsets would take registers that it has not got.
        o_dk, m_dk = rows_and_columns(anew(first), stop, groups, i_group, BN, K, DIM_K, OF_K)
        o_dv, m_dv = rows_and_columns(anew(first), stop, groups, i_group, BN, V, DIM_V, OF_V)
        if GATED:
            b_dot = gl.sum(dk * k_tile.load(OF_K).to(gl.float32), 1)
            o_key = first + gl.arange(0, BN, gl.SliceLayout(1, OF_K))
            gl.store(p_k_dot_dk + (o_key.to(gl.int64) * groups + i_group), b_dot, mask=o_key < stop)
        gl.store(p_dk + o_dk, dk.to(p_dk.dtype.element_ty), mask=m_dk)
        gl.store(p_dv + o_dv, dv.to(p_dv.dtype.element_ty), mask=m_dv)
