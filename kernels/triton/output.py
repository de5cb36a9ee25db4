"""The output kernel: a block of queries attends within its chunk and asks the state before it, in one accumulator."""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.features import load_columns, load_rows, phi_columns, power


@triton.jit
def output_kernel(
    p_q,
    p_k,
    p_v,
    p_sums,
    p_states,
    p_keys,
    p_chunks,
    p_steps,
    p_out,
    p_norm,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_vt,
    s_vh,
    groups,
    blocks,
    steps,
    rows,
    scale,
    power_scale,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REPEATS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_START: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [tokens, H, V] and norm [tokens, H], the sums of weights, for one block of BM queries of one head.

    Grid: row block fastest, then the heads of a group, so that neighbours read the same state from L2.
    """
    i_block = tl.program_id(0) % blocks
    i_repeat = (tl.program_id(0) // blocks) % REPEATS
    i_group = ((tl.program_id(0) // (blocks * REPEATS)) % groups).to(tl.int64)
    i_chunk = (tl.program_id(0) // (blocks * REPEATS * groups)).to(tl.int64)
    i_head = i_group * REPEATS + i_repeat
    start, stop = tl.load(p_chunks + i_chunk * 4), tl.load(p_chunks + i_chunk * 4 + 1)
    first = start + i_block * BM
    if first >= stop:
        return
    has_state = HAS_START or tl.load(p_chunks + i_chunk * 4 + 2) == 0
    o_t = first + tl.arange(0, BM)
    m_t = o_t < stop
    o_v = tl.arange(0, BV)
    m_v = (o_v < V)[None, :]
    p_q += i_head * s_qh
    p_k += i_group * s_kh
    p_v += i_group * s_vh
    slot = (i_chunk * groups + i_group) * rows
    p_states += slot * V
    p_keys += slot

    b_out = tl.zeros([BM, BV], tl.float32)
    b_norm = tl.zeros([BM], tl.float32)
    o_row = tl.arange(0, STEP_ROWS)
    for i_step in range(tl.where(has_state, steps, 0)):
        p_step = p_steps + i_step * (P + 1)
        b_phi = phi_columns(p_q, s_qt, o_t, m_t, p_step, K, P, BK, BM, OPERAND)
        o_state = i_step * STEP_ROWS + o_row
        b_state = tl.load(p_states + o_state[:, None] * V + o_v[None, :], mask=m_v, other=0.0)
        # [BM, STEP_ROWS] @ [STEP_ROWS, BV] -> [BM, BV]
        b_out = tl.dot(b_phi, b_state.to(OPERAND), b_out, input_precision=PRECISION)
        if NORMALIZE and P != 2:
            b_norm += tl.sum(b_phi.to(tl.float32) * tl.load(p_keys + o_state)[None, :], 1)

    b_q = load_columns(p_q, s_qt, o_t, m_t, 0, K, BK)
    if NORMALIZE and P == 2 and has_state:
        # phi(q).z = q^T Z q: one product with K x K instead of K^2 / 2 multiply-adds a row outside the matrix unit.
        o_k = tl.arange(0, BK)
        o_i, o_j = o_k[:, None], o_k[None, :]
        lead = o_i // 8
        # Row (lead tile, last tile) of phi: the steps before lead's, then last - lead, 64 rows each.
        i_pair = lead * (2 * ((K + 7) // 8) - lead + 1) // 2 + o_j // 8 - lead
        m_pair = (o_j // 8 >= lead) & (o_i < K) & (o_j < K)
        b_z = tl.load(p_keys + i_pair * 64 + (o_i % 8) * 8 + o_j % 8, mask=m_pair, other=0.0)
        # [BM, BK] @ [BK, BK] -> [BM, BK]
        b_qz = tl.dot(b_q.to(OPERAND), b_z.to(OPERAND), input_precision=PRECISION)
        b_norm += tl.sum(b_qz * b_q.to(tl.float32), 1)
    b_since = tl.full([BM], power_scale, tl.float32)
    if GATED:
        b_sum = tl.load(p_sums + o_t * groups + i_group, mask=m_t, other=0.0)
        b_since *= tl.exp(b_sum)
    b_out *= b_since[:, None]
    b_norm *= b_since

    for begin in range(start, tl.minimum(first + BM, stop), BN):
        o_s = begin + tl.arange(0, BN)
        m_s = o_s < stop
        b_k = load_rows(p_k, s_kt, o_s, m_s, tl.arange(0, BK), K)
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_w = power(tl.dot(b_q.to(OPERAND), b_k.to(OPERAND), input_precision=PRECISION) * scale, P)
        m_w = (o_t[:, None] >= o_s[None, :]) & m_t[:, None]
        if GATED:
            b_sum_s = tl.load(p_sums + o_s * groups + i_group, mask=m_s, other=0.0)
            b_w *= tl.exp(tl.where(m_w, b_sum[:, None] - b_sum_s[None, :], float("-inf")))
        else:
            b_w = tl.where(m_w, b_w, 0.0)
        b_v = tl.load(p_v + o_s[:, None] * s_vt + o_v[None, :], mask=m_s[:, None] & m_v, other=0.0)
        # [BM, BN] @ [BN, BV] -> [BM, BV]
        b_out = tl.dot(b_w.to(OPERAND), b_v.to(OPERAND), b_out, input_precision=PRECISION)
        b_norm += tl.sum(b_w, 1)

    if NORMALIZE:
        b_out /= tl.where(b_norm == 0, 1.0, b_norm)[:, None]
        tl.store(p_norm + o_t * (groups * REPEATS) + i_head, b_norm, mask=m_t)
    p_rows = p_out + (o_t * (groups * REPEATS) + i_head) * V
    tl.store(p_rows[:, None] + o_v[None, :], b_out.to(p_out.dtype.element_ty), mask=m_t[:, None] & m_v)
