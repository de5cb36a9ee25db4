"""Gradients of queries, and of keys and values: the output kernel's two halves, the other way round.

With g the gradient of the weighted sums and u that of the sum of weights (small.py), the gradient of phi(q) is
S g + z u, and that of x comes back through the products of two 8-wide slices that made phi, step by step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.features import (
    load_column,
    load_columns,
    outer,
    power,
    slope_of_power,
)


@triton.jit
def through_phi(
    p_x,
    s_t,
    o_t,
    m_t,
    b_grad,
    b_share,
    p_state,
    p_key,
    p_steps,
    steps,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEYS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of x [ROWS, BK] where phi(x) meets a state S, z: its own is grad S^T + share z, [ROWS, 64] a step.

    For KEYS phi carries weights, and phi(x) S is returned too, [ROWS, BV]: what the values get.
    """
    o_v = tl.arange(0, BV)
    m_v = (o_v < V)[None, :]
    b_asked = tl.zeros([ROWS, BV], tl.float32)
    if P == 1:
        o_row = tl.arange(0, BK)
        m_row = o_row < tl.where(steps > 0, K, 0)
        b_x = load_columns(p_x, s_t, o_t, m_t, 0, K, BK).to(OPERAND)
        b_state = tl.load(p_state + o_row[:, None] * V + o_v[None, :], mask=m_row[:, None] & m_v, other=0.0).to(OPERAND)
        # [ROWS, BV] @ [BV, BK] -> [ROWS, BK]
        b_dx = tl.dot(b_grad, tl.trans(b_state), input_precision=PRECISION)
        if NORMALIZE:
            b_dx += b_share[:, None] * tl.load(p_key + o_row, mask=m_row, other=0.0)[None, :]
        if KEYS:
            # [ROWS, BK] @ [BK, BV] -> [ROWS, BV]
            b_asked = tl.dot(b_x, b_state, b_asked, input_precision=PRECISION)
    else:
        o_tile = tl.arange(0, BK // 8)
        o_feature = o_tile[:, None] * 8 + tl.arange(0, 8)[None, :]
        b_tiles = tl.zeros([ROWS, BK // 8, 8], tl.float32)
        for i_step in range(steps):
            p_step = p_steps + i_step * (P + 1)
            lead, last = tl.load(p_step + P - 2), tl.load(p_step + P - 1)
            b_lead = load_columns(p_x, s_t, o_t, m_t, lead, K, 8)
            b_last = load_columns(p_x, s_t, o_t, m_t, last, K, 8)
            if P > 2:
                b_single = load_column(p_x, s_t, o_t, m_t, tl.load(p_step))
                if P == 4:
                    b_first = b_single
                    b_second = load_column(p_x, s_t, o_t, m_t, tl.load(p_step + 1))
                    b_single = b_first * b_second
            if KEYS:
                weight = tl.load(p_step + P).to(tl.float32)
            o_row = i_step * 64 + tl.arange(0, 64)
            b_state = tl.load(p_state + o_row[:, None] * V + o_v[None, :], mask=m_v, other=0.0).to(OPERAND)
            # [ROWS, BV] @ [BV, 64] -> [ROWS, 64]
            b_dphi = tl.dot(b_grad, tl.trans(b_state), input_precision=PRECISION)
            if NORMALIZE:
                b_dphi += b_share[:, None] * tl.load(p_key + o_row)[None, :]
            if KEYS:
                b_dphi *= weight
                b_heavy = b_lead.to(tl.float32) * weight
                if P > 2:
                    b_heavy *= b_single[:, None]
                b_phi = outer(b_heavy.to(OPERAND), b_last.to(OPERAND), ROWS)
                # [ROWS, 64] @ [64, BV] -> [ROWS, BV]
                b_asked = tl.dot(b_phi, b_state, b_asked, input_precision=PRECISION)
            b_dphi = tl.reshape(b_dphi, [ROWS, 8, 8])
            b_to_lead = tl.sum(b_dphi * b_last.to(tl.float32)[:, None, :], 2)
            b_to_last = tl.sum(b_dphi * b_lead.to(tl.float32)[:, :, None], 1)
            if P > 2:
                b_to_single = tl.sum(b_to_lead * b_lead.to(tl.float32), 1)
                m_first = (o_feature == tl.load(p_step))[None, :, :]
                if P == 3:
                    b_tiles += tl.where(m_first, b_to_single[:, None, None], 0.0)
                else:
                    m_second = (o_feature == tl.load(p_step + 1))[None, :, :]
                    b_tiles += tl.where(m_first, (b_to_single * b_second)[:, None, None], 0.0)
                    b_tiles += tl.where(m_second, (b_to_single * b_first)[:, None, None], 0.0)
                b_to_lead *= b_single[:, None]
                b_to_last *= b_single[:, None]
            b_tiles += tl.where((o_tile == lead // 8)[None, :, None], b_to_lead[:, None, :], 0.0)
            b_tiles += tl.where((o_tile == last // 8)[None, :, None], b_to_last[:, None, :], 0.0)
        b_dx = tl.reshape(b_tiles, [ROWS, BK])
    return b_dx, b_asked


@triton.jit
def queries_kernel(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_sums,
    p_inverse,
    p_share,
    p_states,
    p_keys,
    p_chunks,
    p_steps,
    p_dq,
    p_dot,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_vt,
    s_vh,
    s_gt,
    s_gh,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_START: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq [tokens, H, K], and q.dq [tokens, H] in float32 where GATED, for one block of BM queries of one head."""
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

    o_q = o_t * (groups * REPEATS) + i_head
    p_rows = p_grad + i_head * s_gh + o_t * s_gt
    b_grad = tl.load(p_rows[:, None] + o_v[None, :], mask=m_t[:, None] & m_v, other=0.0).to(tl.float32)
    b_share = tl.zeros([BM], tl.float32)
    if NORMALIZE:
        b_grad *= tl.load(p_inverse + o_q, mask=m_t, other=0.0)[:, None]
        b_share = tl.load(p_share + o_q, mask=m_t, other=0.0)
    b_since = tl.full([BM], power_scale, tl.float32)
    if GATED:
        b_sum = tl.load(p_sums + o_t * groups + i_group, mask=m_t, other=0.0)
        b_since *= tl.exp(b_sum)
    b_dq, _ = through_phi(
        p_q,
        s_qt,
        o_t,
        m_t,
        (b_grad * b_since[:, None]).to(OPERAND),
        b_share * b_since,
        p_states + slot * V,
        p_keys + slot,
        p_steps,
        tl.where(has_state, steps, 0),
        K,
        V,
        P,
        BK,
        BV,
        BM,
        NORMALIZE,
        False,
        OPERAND,
        PRECISION,
    )

    b_q = load_columns(p_q, s_qt, o_t, m_t, 0, K, BK)
    b_grad = b_grad.to(OPERAND)
    for begin in range(start, tl.minimum(first + BM, stop), BN):
        o_s = begin + tl.arange(0, BN)
        m_s = o_s < stop
        b_k = load_columns(p_k, s_kt, o_s, m_s, 0, K, BK).to(OPERAND)
        b_v = tl.load(p_v + o_s[:, None] * s_vt + o_v[None, :], mask=m_s[:, None] & m_v, other=0.0).to(OPERAND)
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_s = tl.dot(b_q.to(OPERAND), tl.trans(b_k), input_precision=PRECISION) * scale
        # [BM, BV] @ [BV, BN] -> [BM, BN]
        b_ds = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
        if NORMALIZE:
            b_ds += b_share[:, None]
        b_ds *= slope_of_power(b_s, P) * scale
        m_w = (o_t[:, None] >= o_s[None, :]) & m_t[:, None]
        if GATED:
            b_sum_s = tl.load(p_sums + o_s * groups + i_group, mask=m_s, other=0.0)
            b_ds *= tl.exp(tl.where(m_w, b_sum[:, None] - b_sum_s[None, :], float("-inf")))
        else:
            b_ds = tl.where(m_w, b_ds, 0.0)
        # [BM, BN] @ [BN, BK] -> [BM, BK]
        b_dq = tl.dot(b_ds.to(OPERAND), b_k, b_dq, input_precision=PRECISION)

    o_k = tl.arange(0, BK)
    m_block = m_t[:, None] & (o_k < K)[None, :]
    tl.store(p_dq + o_q[:, None] * K + o_k[None, :], b_dq.to(p_dq.dtype.element_ty), mask=m_block)
    if GATED:
        tl.store(p_dot + o_q, tl.sum(b_q.to(tl.float32) * b_dq, 1), mask=m_t)


@triton.jit
def keys_kernel(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_sums,
    p_inverse,
    p_share,
    p_states,
    p_keys,
    p_chunks,
    p_steps,
    p_dk,
    p_dv,
    p_dot,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_vt,
    s_vh,
    s_gt,
    s_gh,
    groups,
    blocks,
    steps,
    rows,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REPEATS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_START: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk [tokens, G, K], dv [tokens, G, V], and k.dk [tokens, G] in float32 where GATED, for one block of BN keys.

    states, keys: gradients of the state after each chunk; HAS_START: there is one after the last chunk too.
    """
    i_block = tl.program_id(0) % blocks
    i_group = ((tl.program_id(0) // blocks) % groups).to(tl.int64)
    i_chunk = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    start, stop = tl.load(p_chunks + i_chunk * 4), tl.load(p_chunks + i_chunk * 4 + 1)
    first = start + i_block * BN
    if first >= stop:
        return
    has_state = HAS_START or tl.load(p_chunks + i_chunk * 4 + 3) == 0
    o_s = first + tl.arange(0, BN)
    m_s = o_s < stop
    o_v = tl.arange(0, BV)
    m_v = (o_v < V)[None, :]
    p_k += i_group * s_kh
    p_v += i_group * s_vh
    slot = (i_chunk * groups + i_group) * rows

    b_v = tl.load(p_v + o_s[:, None] * s_vt + o_v[None, :], mask=m_s[:, None] & m_v, other=0.0)
    b_left = tl.full([BN], 1.0, tl.float32)
    if GATED:
        b_sum_s = tl.load(p_sums + o_s * groups + i_group, mask=m_s, other=0.0)
        b_left = tl.exp(tl.load(p_sums + (stop - 1) * groups + i_group) - b_sum_s)
    b_dk, b_dv = through_phi(
        p_k,
        s_kt,
        o_s,
        m_s,
        (b_v.to(tl.float32) * b_left[:, None]).to(OPERAND),
        b_left,
        p_states + slot * V,
        p_keys + slot,
        p_steps,
        tl.where(has_state, steps, 0),
        K,
        V,
        P,
        BK,
        BV,
        BN,
        NORMALIZE,
        True,
        OPERAND,
        PRECISION,
    )
    b_dv *= b_left[:, None]

    b_k = load_columns(p_k, s_kt, o_s, m_s, 0, K, BK)
    b_v = b_v.to(OPERAND)
    own = start + (first - start) // BM * BM
    row_blocks = tl.cdiv(stop - own, BM)
    for index in range(row_blocks * REPEATS):
        i_head = i_group * REPEATS + index // row_blocks
        o_t = own + (index % row_blocks) * BM + tl.arange(0, BM)
        m_t = o_t < stop
        o_q = o_t * (groups * REPEATS) + i_head
        b_q = load_columns(p_q + i_head * s_qh, s_qt, o_t, m_t, 0, K, BK).to(OPERAND)
        p_rows = p_grad + i_head * s_gh + o_t * s_gt
        b_grad = tl.load(p_rows[:, None] + o_v[None, :], mask=m_t[:, None] & m_v, other=0.0)
        if NORMALIZE:
            b_inverse = tl.load(p_inverse + o_q, mask=m_t, other=0.0)
            b_grad = b_grad.to(tl.float32) * b_inverse[:, None]
        b_grad = b_grad.to(OPERAND)
        # [BN, BK] @ [BK, BM] -> [BN, BM]
        b_s = tl.dot(b_k.to(OPERAND), tl.trans(b_q), input_precision=PRECISION) * scale
        m_w = (o_t[None, :] >= o_s[:, None]) & m_t[None, :]
        if GATED:
            b_sum = tl.load(p_sums + o_t * groups + i_group, mask=m_t, other=0.0)
            b_between = tl.exp(tl.where(m_w, b_sum[None, :] - b_sum_s[:, None], float("-inf")))
        else:
            b_between = tl.where(m_w, 1.0, 0.0)
        b_w = power(b_s, P) * b_between
        # [BN, BM] @ [BM, BV] -> [BN, BV]
        b_dv = tl.dot(b_w.to(OPERAND), b_grad, b_dv, input_precision=PRECISION)
        # [BN, BV] @ [BV, BM] -> [BN, BM]
        b_ds = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
        if NORMALIZE:
            b_ds += tl.load(p_share + o_q, mask=m_t, other=0.0)[None, :]
        b_ds *= slope_of_power(b_s, P) * scale * b_between
        # [BN, BM] @ [BM, BK] -> [BN, BK]
        b_dk = tl.dot(b_ds.to(OPERAND), b_q, b_dk, input_precision=PRECISION)

    o_k = tl.arange(0, BK)
    o_g = o_s * groups + i_group
    tl.store(
        p_dk + o_g[:, None] * K + o_k[None, :],
        b_dk.to(p_dk.dtype.element_ty),
        mask=m_s[:, None] & (o_k < K)[None, :],
    )
    tl.store(p_dv + o_g[:, None] * V + o_v[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_s[:, None] & m_v)
    if GATED:
        tl.store(p_dot + o_g, tl.sum(b_k.to(tl.float32) * b_dk, 1), mask=m_s)
