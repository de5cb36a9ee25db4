"""The gradient of queries: the output kernel's two parts, the state before the chunk and the chunk itself, backward.

With y the gradient of the sum of weighted values and u that of the sum of weights, norm (prepare.py), the gradient of
phi(q) is kv y + key u, and that of a weight is y.v + u. Legend: prologue.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.features import power_derivative, rounded, squared
from powerplan.kernels.triton.phi_gradient import grad_through_phi
from powerplan.kernels.triton.prologue import (
    FIRST_IN_SEQUENCE,
    chunk_bounds,
    chunk_flag,
    decay_between,
    load_columns,
    load_sums,
    owned_block,
    token_block,
)


@triton.jit
def queries_kernel(
    p_q,
    p_k,
    p_v,
    p_grad_out,
    p_log_g_cumsum,
    p_inverse_norm,
    p_grad_norm,
    p_state_kv,
    p_state_key,
    p_chunks,
    p_steps,
    p_dq,
    p_q_dot_dq,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_vt,
    s_vh,
    s_gt,
    s_gh,
    groups,
    token_blocks,
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
    """Compute dq for BM queries of one head. Grid: slots H token_blocks programs (owned_block).

    q: [tokens, H, K] in.
    k: [tokens, G, K] in.
    v: [tokens, G, V] in.
    grad_out: [tokens, H, V] in, strides s_gt and s_gh.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED.
    inverse_norm, grad_norm: [tokens, H] float32 in, where NORMALIZE (grad_norm_kernel).
    state_kv: [slots, G, rows, V] bf16 or float32 in, the state before each chunk.
    state_key: [slots, G, rows] float32 in, likewise, where NORMALIZE; for P = 2 Z = sum k k^T, [slots, G, BK, BK].
    chunks: [slots, 4] int64 in.
    steps: [steps, P + 1] int32 in.
    dq: [tokens, H, K] out.
    q_dot_dq: [tokens, H] float32 out, where GATED: a query's share of the gradient of log_g_cumsum, times P.
    HAS_START: whether the first chunk of a sequence has a state before it, too.
    """
    i_block, i_chunk, i_group, i_head = owned_block(token_blocks, groups, REPEATS)
    start, stop = chunk_bounds(p_chunks, i_chunk)
    first = start + i_block * BM
    if first >= stop:
        return
    has_state = HAS_START or chunk_flag(p_chunks, i_chunk, FIRST_IN_SEQUENCE) == 0
    o_t, m_t = token_block(first, stop, BM)
    o_v = tl.arange(0, BV)
    m_v = (o_v < V)[None, :]
    p_q += i_head * s_qh
    p_k += i_group * s_kh
    p_v += i_group * s_vh
    slot = (i_chunk * groups + i_group) * rows

    # Load y = grad_out / norm, in float32: it is rounded to OPERAND after the decay, not before.
    o_query = o_t * (groups * REPEATS) + i_head
    p_rows = p_grad_out + i_head * s_gh + o_t * s_gt
    b_y = tl.load(p_rows[:, None] + o_v[None, :], mask=m_t[:, None] & m_v, other=0.0).to(tl.float32)
    b_grad_norm = tl.zeros([BM], tl.float32)
    if NORMALIZE:
        b_y *= tl.load(p_inverse_norm + o_query, mask=m_t, other=0.0)[:, None]
        b_grad_norm = tl.load(p_grad_norm + o_query, mask=m_t, other=0.0)

    # The state's part. Decay since the start of the chunk, exp(a_t) in [0, 1], multiplies y, once for all steps.
    b_since_start = tl.full([BM], power_scale, tl.float32)
    if GATED:
        b_cumsum_t, b_rest_t = load_sums(p_log_g_cumsum, o_t, m_t, groups, i_group)
        b_since_start *= tl.exp(b_cumsum_t)
    b_dq, _ = grad_through_phi(
        p_q,
        s_qt,
        o_t,
        m_t,
        rounded(b_y * b_since_start[:, None], OPERAND, PRECISION),
        b_grad_norm * b_since_start,
        p_state_kv + slot * V,
        p_state_key + slot,
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
    if NORMALIZE and P == 2:
        p_square = p_state_key + (i_chunk * groups + i_group) * (BK * BK)
        b_qz = squared(p_q, s_qt, o_t, m_t, p_square, has_state, K, BK, BM, OPERAND, PRECISION)
        b_dq += b_qz * (2.0 * b_grad_norm * b_since_start)[:, None]

    # The chunk's part, over blocks of keys up to the last query, with scores computed again: K multiply-adds each,
    # where storing them would take 2 bytes for every pair of tokens.
    b_y = rounded(b_y, OPERAND, PRECISION)
    for begin in range(start, tl.minimum(first + BM, stop), BN):
        o_s, m_s = token_block(begin, stop, BN)
        b_k = load_columns(p_k, s_kt, o_s, m_s, 0, K, BK).to(OPERAND)
        b_v = load_columns(p_v, s_vt, o_s, m_s, 0, V, BV).to(OPERAND)
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_s = tl.dot(b_q.to(OPERAND), tl.trans(b_k), input_precision=PRECISION) * scale
        # [BM, BV] @ [BV, BN] -> [BM, BN]
        b_ds = tl.dot(b_y, tl.trans(b_v), input_precision=PRECISION)
        if NORMALIZE:
            b_ds += b_grad_norm[:, None]
        b_ds *= power_derivative(b_s, P) * scale
        m_seen = (o_t[:, None] >= o_s[None, :]) & m_t[:, None]
        if GATED:
            b_cumsum_s, b_rest_s = load_sums(p_log_g_cumsum, o_s, m_s, groups, i_group)
            b_ds *= decay_between(
                b_cumsum_t[:, None], b_rest_t[:, None], b_cumsum_s[None, :], b_rest_s[None, :], m_seen
            )
        else:
            b_ds = tl.where(m_seen, b_ds, 0.0)
        # [BM, BN] @ [BN, BK] -> [BM, BK]
        b_dq = tl.dot(rounded(b_ds, OPERAND, PRECISION), b_k, b_dq, input_precision=PRECISION)

    # Store. Every weight is homogeneous of degree P in q, so q.dq / P is what a_t gets from this query: the gates cost
    # K multiply-adds a token, from dq in float32, before it is rounded.
    o_k = tl.arange(0, BK)
    m_dq = m_t[:, None] & (o_k < K)[None, :]
    tl.store(p_dq + o_query[:, None] * K + o_k[None, :], b_dq.to(p_dq.dtype.element_ty), mask=m_dq)
    if GATED:
        tl.store(p_q_dot_dq + o_query, tl.sum(b_q.to(tl.float32) * b_dq, 1), mask=m_t)
