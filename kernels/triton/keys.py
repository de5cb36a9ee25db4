"""The gradients of keys and values: from the state after the chunk, and from the queries of the chunk itself.

With y the gradient of the sum of weighted values and u that of the sum of weights, norm (prepare.py), a weight w of a
query on a key gives w y to dv, and y.v + u is the gradient of w. Legend: prologue.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.features import power, power_derivative, rounded, squared
from powerplan.kernels.triton.phi_gradient import grad_through_phi
from powerplan.kernels.triton.prologue import (
    LAST_IN_SEQUENCE,
    chunk_bounds,
    chunk_flag,
    decay_between,
    load_columns,
    load_sum,
    load_sums,
    owned_block,
    token_block,
)


@triton.jit
def keys_kernel(
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
    p_dk,
    p_dv,
    p_k_dot_dk,
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
    """Compute dk and dv for BN keys of one key/value head. Grid: slots G token_blocks programs (owned_block).

    q: [tokens, H, K] in.
    k: [tokens, G, K] in.
    v: [tokens, G, V] in.
    grad_out: [tokens, H, V] in, strides s_gt and s_gh.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED.
    inverse_norm, grad_norm: [tokens, H] float32 in, where NORMALIZE (grad_norm_kernel).
    state_kv: [slots, G, rows, V] bf16 or float32 in, the gradient of the state after each chunk.
    state_key: [slots, G, rows] float32 in, likewise, where NORMALIZE; for P = 2 that of Z = sum k k^T, [slots, G, BK,
        BK].
    chunks: [slots, 4] int64 in.
    steps: [steps, P + 1] int32 in.
    dk: [tokens, G, K] out.
    dv: [tokens, G, V] out.
    k_dot_dk: [tokens, G] float32 out, where GATED: a key's share of the gradient of log_g_cumsum, times -P.
    HAS_START: whether the last chunk of a sequence has a gradient of the state after it, too.
    """
    # One program for a block of keys, which walks the queries of all heads of the group: no atomic sums.
    i_block, i_chunk, i_group, _ = owned_block(token_blocks, groups, 1)
    start, stop = chunk_bounds(p_chunks, i_chunk)
    first = start + i_block * BN
    if first >= stop:
        return
    has_state = HAS_START or chunk_flag(p_chunks, i_chunk, LAST_IN_SEQUENCE) == 0
    o_s, m_s = token_block(first, stop, BN)
    o_v = tl.arange(0, BV)
    m_v = (o_v < V)[None, :]
    p_k += i_group * s_kh
    p_v += i_group * s_vh
    slot = (i_chunk * groups + i_group) * rows

    # The state's part. Decay to the end of the chunk, exp(a_M - a_s) in [0, 1], multiplies v, once for all steps, and
    # dv after the last one.
    b_v = load_columns(p_v, s_vt, o_s, m_s, 0, V, BV)
    b_to_end = tl.full([BN], 1.0, tl.float32)
    if GATED:
        b_cumsum_s, b_rest_s = load_sums(p_log_g_cumsum, o_s, m_s, groups, i_group)
        b_total, b_total_rest = load_sum(p_log_g_cumsum, stop - 1, groups, i_group)
        b_to_end = tl.exp((b_total - b_cumsum_s) + (b_total_rest - b_rest_s))
    b_dk, b_dv = grad_through_phi(
        p_k,
        s_kt,
        o_s,
        m_s,
        rounded(b_v.to(tl.float32) * b_to_end[:, None], OPERAND, PRECISION),
        b_to_end,
        p_state_kv + slot * V,
        p_state_key + slot,
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
    b_dv *= b_to_end[:, None]
    b_k = load_columns(p_k, s_kt, o_s, m_s, 0, K, BK)

    # The chunk's part, over the group's blocks of queries, from the one on that holds the first of these keys. Scores
    # are computed again, as in queries_kernel.
    b_v = b_v.to(OPERAND)
    first_query = start + (first - start) // BM * BM
    query_blocks = tl.cdiv(stop - first_query, BM)
    for index in range(query_blocks * REPEATS):
        # Load a block of queries of one head, and y = grad_out / norm.
        i_head = i_group * REPEATS + index // query_blocks
        o_t, m_t = token_block(first_query + (index % query_blocks) * BM, stop, BM)
        o_query = o_t * (groups * REPEATS) + i_head
        b_q = load_columns(p_q + i_head * s_qh, s_qt, o_t, m_t, 0, K, BK).to(OPERAND)
        p_rows = p_grad_out + i_head * s_gh + o_t * s_gt
        b_y = tl.load(p_rows[:, None] + o_v[None, :], mask=m_t[:, None] & m_v, other=0.0)
        if NORMALIZE:
            b_inverse_norm = tl.load(p_inverse_norm + o_query, mask=m_t, other=0.0)
            b_y = b_y.to(tl.float32) * b_inverse_norm[:, None]
        b_y = rounded(b_y, OPERAND, PRECISION)
        # Weights, with keys as rows: dk and dv are sums over queries, and so no product needs its result transposed.
        # [BN, BK] @ [BK, BM] -> [BN, BM]
        b_s = tl.dot(b_k.to(OPERAND), tl.trans(b_q), input_precision=PRECISION) * scale
        m_seen = (o_t[None, :] >= o_s[:, None]) & m_t[None, :]
        if GATED:
            b_cumsum_t, b_rest_t = load_sums(p_log_g_cumsum, o_t, m_t, groups, i_group)
            b_between = decay_between(
                b_cumsum_t[None, :], b_rest_t[None, :], b_cumsum_s[:, None], b_rest_s[:, None], m_seen
            )
        else:
            b_between = tl.where(m_seen, 1.0, 0.0)
        b_w = power(b_s, P) * b_between
        # Accumulate dv.
        # [BN, BM] @ [BM, BV] -> [BN, BV]
        b_dv = tl.dot(rounded(b_w, OPERAND, PRECISION), b_y, b_dv, input_precision=PRECISION)
        # Accumulate dk.
        # [BN, BV] @ [BV, BM] -> [BN, BM]
        b_ds = tl.dot(b_v, tl.trans(b_y), input_precision=PRECISION)
        if NORMALIZE:
            b_ds += tl.load(p_grad_norm + o_query, mask=m_t, other=0.0)[None, :]
        b_ds *= power_derivative(b_s, P) * scale * b_between
        # [BN, BM] @ [BM, BK] -> [BN, BK]
        b_dk = tl.dot(rounded(b_ds, OPERAND, PRECISION), b_q, b_dk, input_precision=PRECISION)

    # The normaliser's part comes last: before the loop its product would take registers that the loop needs.
    if NORMALIZE and P == 2:
        p_square = p_state_key + (i_chunk * groups + i_group) * (BK * BK)
        b_kz = squared(p_k, s_kt, o_s, m_s, p_square, has_state, K, BK, BN, OPERAND, PRECISION)
        b_dk += b_kz * (2.0 * b_to_end)[:, None]

    # Store. Every weight is homogeneous of degree P in k, so -k.dk / P is what a_s gets from this key.
    o_k = tl.arange(0, BK)
    o_key = o_s * groups + i_group
    tl.store(
        p_dk + o_key[:, None] * K + o_k[None, :],
        b_dk.to(p_dk.dtype.element_ty),
        mask=m_s[:, None] & (o_k < K)[None, :],
    )
    tl.store(p_dv + o_key[:, None] * V + o_v[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_s[:, None] & m_v)
    if GATED:
        tl.store(p_k_dot_dk + o_key, tl.sum(b_k.to(tl.float32) * b_dk, 1), mask=m_s)
