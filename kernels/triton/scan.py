"""The state scan, forward and backward: one program walks a sequence with a tile of the state in registers.

Forward: before each chunk the state is stored; then it decays by exp(a_M) and takes in exp(a_M - a_t) phi(k_t) v_t^T.
Backward: the same from the last chunk to the first, for the gradient of the state after each chunk, which takes in
exp(a_t) scale^p phi(q_t) g_t^T over all query heads of the group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.features import phi_rows, weight_of_steps


@triton.jit
def scan_kernel(
    p_x,
    p_v,
    p_sums,
    p_inverse,
    p_share,
    p_start,
    p_start_key,
    p_states,
    p_keys,
    p_end,
    p_end_key,
    p_past,
    p_past_keys,
    p_reach,
    p_chunks,
    p_first_chunk,
    p_steps,
    s_xt,
    s_xh,
    s_vt,
    s_vh,
    groups,
    step_groups,
    rows,
    power_scale,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REPEATS: tl.constexpr,
    STEPS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_START: tl.constexpr,
    WANT_END: tl.constexpr,
    BACKWARD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store states [chunks, G, rows, V] and keys [chunks, G, rows] at every chunk border of every sequence.

    x [tokens, G or H, K], v [tokens, G or H, V] with strides; start, end [N, G, rows, V] and their keys in float32.
    Forward, slot c is the state before chunk c. Backward, x is q, v
    the gradient of the output, and slot c the gradient of the state after chunk c (not written after a last one without
    a start), end that of the initial state; reach [chunks, G, step_groups] gets <dS, S> of the state S after each chunk
    but the last, past and its keys being the states before chunks: all that later tokens owe to the chunk's gates.
    """
    ROWS: tl.constexpr = STEPS * STEP_ROWS
    i_step = (tl.program_id(0) % step_groups) * STEPS
    i_head = tl.program_id(0) // step_groups
    i_sequence = i_head // groups
    i_group = (i_head % groups).to(tl.int64)
    o_row = i_step * STEP_ROWS + tl.arange(0, ROWS)
    o_v = tl.arange(0, BV)
    m_v = (o_v < V)[None, :]
    o_tile = o_row[:, None] * V + o_v[None, :]
    head_rows = i_head.to(tl.int64) * rows
    b_weight = weight_of_steps(p_steps, i_step, P, STEPS, STEP_ROWS)

    b_state = tl.zeros([ROWS, BV], tl.float32)
    b_key = tl.zeros([ROWS], tl.float32)
    if HAS_START:
        b_state = tl.load(p_start + head_rows * V + o_tile, mask=m_v, other=0.0)
        if NORMALIZE:
            b_key = tl.load(p_start_key + head_rows + o_row)
        if not BACKWARD:
            b_unweighted = 1.0 / tl.where(b_weight == 0, 1.0, b_weight)
            b_state *= b_unweighted[:, None]
            b_key *= b_unweighted

    first_chunk, stop_chunk = tl.load(p_first_chunk + i_sequence), tl.load(p_first_chunk + i_sequence + 1)
    for index in range(stop_chunk - first_chunk):
        i_chunk = first_chunk + index
        if BACKWARD:
            i_chunk = stop_chunk - 1 - index
        start, stop = tl.load(p_chunks + i_chunk * 4), tl.load(p_chunks + i_chunk * 4 + 1)
        if HAS_START or index > 0 or not BACKWARD:
            slot = (i_chunk * groups + i_group) * rows
            b_stored = b_state
            b_stored_key = b_key
            if not BACKWARD:
                b_stored = b_state * b_weight[:, None]
                b_stored_key = b_key * b_weight
            tl.store(p_states + slot * V + o_tile, b_stored.to(p_states.dtype.element_ty), mask=m_v)
            if NORMALIZE:
                tl.store(p_keys + slot + o_row, b_stored_key)
            if BACKWARD and GATED and index > 0:
                slot += groups * rows
                b_past = tl.load(p_past + slot * V + o_tile, mask=m_v, other=0.0).to(tl.float32)
                b_reach = tl.sum(b_past * b_state, 1)
                if NORMALIZE:
                    b_reach += tl.load(p_past_keys + slot + o_row) * b_key
                p_own = p_reach + (i_chunk * groups + i_group) * step_groups + tl.program_id(0) % step_groups
                tl.store(p_own, tl.sum(b_reach, 0))
        if WANT_END or index < stop_chunk - first_chunk - 1:
            b_total = 0.0
            if GATED:
                b_total = tl.load(p_sums + (stop - 1) * groups + i_group)
                b_state *= tl.exp(b_total)
                b_key *= tl.exp(b_total)
            blocks = tl.cdiv(stop - start, BLOCK)
            for i_block in range(blocks * REPEATS):
                i_x = i_group * REPEATS + i_block // blocks
                o_t = start + (i_block % blocks) * BLOCK + tl.arange(0, BLOCK)
                m_t = o_t < stop
                p_head = p_x + i_x * s_xh
                b_phi = phi_rows(p_head, s_xt, o_t, m_t, p_steps, i_step, K, P, BK, STEPS, BLOCK, OPERAND)
                b_v = tl.load(p_v + i_x * s_vh + o_t[:, None] * s_vt + o_v[None, :], mask=m_t[:, None] & m_v, other=0.0)
                b_factor = tl.full([BLOCK], 1.0, tl.float32)
                if GATED:
                    b_sum = tl.load(p_sums + o_t * groups + i_group, mask=m_t, other=0.0)
                    b_factor = tl.exp(b_sum if BACKWARD else b_total - b_sum)
                b_key_factor = b_factor
                if BACKWARD:
                    b_factor *= power_scale
                    o_q = o_t * (groups * REPEATS) + i_x
                    if NORMALIZE:
                        b_key_factor = b_factor * tl.load(p_share + o_q, mask=m_t, other=0.0)
                        b_factor *= tl.load(p_inverse + o_q, mask=m_t, other=0.0)
                if GATED or BACKWARD:
                    b_v = b_v.to(tl.float32) * b_factor[:, None]
                # [ROWS, BLOCK] @ [BLOCK, BV] -> [ROWS, BV]
                b_state = tl.dot(b_phi, b_v.to(OPERAND), b_state, input_precision=PRECISION)
                if NORMALIZE:
                    if GATED or BACKWARD:
                        b_key += tl.sum(b_phi.to(tl.float32) * b_key_factor[None, :], 1)
                    else:
                        b_key += tl.sum(b_phi.to(tl.float32), 1)

    if WANT_END:
        if not BACKWARD:
            b_state *= b_weight[:, None]
            b_key *= b_weight
        tl.store(p_end + head_rows * V + o_tile, b_state, mask=m_v)
        if NORMALIZE:
            tl.store(p_end_key + head_rows + o_row, b_key)
