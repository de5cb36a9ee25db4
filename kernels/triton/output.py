"""The output kernel: each block of queries reads the state before its chunk, then attends within the chunk.

Both parts of the output are summed in one accumulator; neither of them, nor any weight, is stored. Legend: prologue.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.features import add_product, phi_columns, power, rounded, squared
from powerplan.kernels.triton.prologue import (
    FIRST_IN_SEQUENCE,
    chunk_bounds,
    chunk_flag,
    decay_between,
    divisor,
    load_columns,
    load_rows,
    load_sums,
    owned_block,
    token_block,
)


@triton.jit
def output_kernel(
    p_q,
    p_k,
    p_v,
    p_log_g_cumsum,
    p_state_kv,
    p_state_key,
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
    STEP_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_START: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the output for BM queries of one head. Grid: slots H token_blocks programs (owned_block).

    q: [tokens, H, K] in.
    k: [tokens, G, K] in.
    v: [tokens, G, V] in.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED.
    state_kv: [slots, G, rows, V] bf16 or float32 in, the state before each chunk.
    state_key: [slots, G, rows] float32 in, likewise, where NORMALIZE; for P = 2 Z = sum k k^T, [slots, G, BK, BK].
    chunks: [slots, 4] int64 in.
    steps: [steps, P + 1] int32 in.
    out: [tokens, H, V] out.
    norm: [tokens, H] float32 out, where NORMALIZE: the sum of each query's weights.
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
    p_state_kv += slot * V
    p_state_key += (i_chunk * groups + i_group) * (BK * BK) if P == 2 else slot

    # Decay since the start of the chunk, exp(a_t) in [0, 1], once a query instead of once a step; and scale^P with it.
    b_since_start = tl.full([BM], power_scale, tl.float32)
    if GATED:
        b_cumsum, _ = load_sums(p_log_g_cumsum, o_t, m_t, groups, i_group)
        b_since_start *= tl.exp(b_cumsum)

    # Query the state, phi(q) kv, step by step. A block reads all of it from L2: at K = V = 64, P = 2 that is 295 KB in
    # bf16, for 38 million FLOPs with 128 queries, 128 a byte. So the block is as large as registers allow.
    b_norm = tl.zeros([BM], tl.float32)
    o_query = o_t * (groups * REPEATS) + i_head
    b_out = tl.zeros([BM, BV], tl.float32)
    o_row = tl.arange(0, STEP_ROWS)
    for i_step in range(tl.where(has_state, steps, 0)):
        p_step = p_steps + i_step * (P + 1)
        b_phi = phi_columns(p_q, s_qt, o_t, m_t, p_step, K, P, BK, BM, OPERAND)
        o_state = i_step * STEP_ROWS + o_row
        b_kv = tl.load(p_state_kv + o_state[:, None] * V + o_v[None, :], mask=m_v, other=0.0)
        # [BM, STEP_ROWS] @ [STEP_ROWS, BV] -> [BM, BV]
        b_left = rounded(b_phi, OPERAND, PRECISION)
        b_out = add_product(b_left, b_kv.to(OPERAND), b_out, P, PRECISION)
        if NORMALIZE and P != 2:
            b_norm += tl.sum(b_phi.to(tl.float32) * tl.load(p_state_key + o_state)[None, :], 1)
    b_out *= b_since_start[:, None]

    # The state's part of the normaliser for P = 2: q^T Z q. One product with K x K in the matrix unit takes the place
    # of K^2 / 2 multiply-adds a query outside it.
    b_q = load_columns(p_q, s_qt, o_t, m_t, 0, K, BK)
    if NORMALIZE and P == 2:
        b_qz = squared(p_q, s_qt, o_t, m_t, p_state_key, has_state, K, BK, BM, OPERAND, PRECISION)
        b_norm += tl.sum(b_qz * b_q.to(tl.float32), 1)
    b_norm *= b_since_start

    # Attend within the chunk, to blocks of keys up to the last query. Keys at or behind `stop` need no mask of their
    # own: they come after every query before it.
    if GATED:  # Loaded anew: kept over the steps of phi, both words take registers that the loop has not got.
        b_cumsum_t, b_rest_t = load_sums(p_log_g_cumsum, o_t, m_t, groups, i_group)
    for begin in range(start, tl.minimum(first + BM, stop), BN):
        o_s, m_s = token_block(begin, stop, BN)
        b_k = load_rows(p_k, s_kt, o_s, m_s, tl.arange(0, BK), K)
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_w = power(tl.dot(b_q.to(OPERAND), b_k.to(OPERAND), input_precision=PRECISION) * scale, P)
        m_seen = (o_t[:, None] >= o_s[None, :]) & m_t[:, None]
        if GATED:
            b_cumsum_s, b_rest_s = load_sums(p_log_g_cumsum, o_s, m_s, groups, i_group)
            b_w *= decay_between(b_cumsum_t[:, None], b_rest_t[:, None], b_cumsum_s[None, :], b_rest_s[None, :], m_seen)
        else:
            b_w = tl.where(m_seen, b_w, 0.0)
        b_v = load_columns(p_v, s_vt, o_s, m_s, 0, V, BV)
        # [BM, BN] @ [BN, BV] -> [BM, BV]
        b_out = tl.dot(rounded(b_w, OPERAND, PRECISION), b_v.to(OPERAND), b_out, input_precision=PRECISION)
        b_norm += tl.sum(b_w, 1)

    # Normalise and store. norm is kept for the backward pass: 4 bytes a query, instead of another walk over the keys.
    if NORMALIZE:
        b_out /= divisor(b_norm)[:, None]
        tl.store(p_norm + o_query, b_norm, mask=m_t)
    tl.store(p_out + o_query[:, None] * V + o_v[None, :], b_out.to(p_out.dtype.element_ty), mask=m_t[:, None] & m_v)
