"""The small kernels: sums of gates within chunks, forward and backward, and the gradients of a quotient.

Together they read and write some bytes a token and head. Legend: prologue.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.call import LOWEST_LOG_GATE
from powerplan.kernels.triton.prologue import SMALLEST, chunk_bounds, divisor, load_gates, token_block

LOWEST = tl.constexpr(LOWEST_LOG_GATE)
"""The lowest log_g that counts; lower ones, -inf included, count as this one."""


@triton.jit
def log_g_cumsum_kernel(p_log_g, p_log_g_cumsum, p_chunks, groups, BLOCK: tl.constexpr):
    """Sum log_g from the start of each chunk to each of its tokens. Grid: slots G programs.

    log_g: [tokens, G] contiguous, in. Values below LOWEST count as LOWEST.
    log_g_cumsum: [tokens, G, 2] float32 out, summed in float64: the sum, and what rounding to float32 left of it.
    chunks: [slots, 4] int64 in.
    BLOCK: tokens summed at a time.
    """
    i_chunk = tl.program_id(0) // groups
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    start, stop = chunk_bounds(p_chunks, i_chunk)
    b_total = tl.zeros([1], tl.float64)
    for first in range(start, stop, BLOCK):
        o_t, m_t = token_block(first, stop, BLOCK)
        b_log_g = load_gates(p_log_g, o_t, m_t, groups, i_group).to(tl.float64)
        b_log_g = tl.where(b_log_g < LOWEST, LOWEST, b_log_g)  # and not tl.maximum, which makes a number of NaN
        b_sum = b_total + tl.cumsum(b_log_g, 0)
        b_word = b_sum.to(tl.float32)
        p_words = p_log_g_cumsum + (o_t * groups + i_group) * 2
        tl.store(p_words, b_word, mask=m_t)
        tl.store(p_words + 1, (b_sum - b_word.to(tl.float64)).to(tl.float32), mask=m_t)
        b_total += tl.sum(b_log_g, 0)


@triton.jit
def grad_log_g_kernel(
    p_q_dot_dq,
    p_k_dot_dk,
    p_grad_gate_carry,
    p_log_g,
    p_grad_log_g,
    p_chunks,
    groups,
    parts,
    P: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sum the gradient of log_g_cumsum from each token to the end of its chunk. Grid: slots G programs.

    A weight is homogeneous of degree P in its query and its key, so that dL/da is (sum_h q.dq - k.dk) / P.

    The sum starts from the carry, which holds all that later chunks add, and so ends with the chunk: over the whole
    sequence the roundings of q.dq and k.dk, which cancel in exact arithmetic only, would add up like a random walk.

    q_dot_dq: [tokens, H] float32 in, P times a query's share of dL/da.
    k_dot_dk: [tokens, G] float32 in, -P times a key's.
    grad_gate_carry: [slots, G, parts] float32 in, parts of <dS, S> of the state after each chunk.
    log_g: [tokens, G] contiguous, in. Where it counts as LOWEST it has no gradient.
    grad_log_g: [tokens, G] out, of log_g's dtype.
    chunks: [slots, 4] int64 in.
    BLOCK: tokens summed at a time. PARTS: parts summed at a time.
    """
    i_chunk = tl.program_id(0) // groups
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    start, stop = chunk_bounds(p_chunks, i_chunk)
    b_total = 0.0
    for first in range(0, parts, PARTS):
        o_part = first + tl.arange(0, PARTS)
        p_parts = p_grad_gate_carry + (i_chunk * groups + i_group) * parts + o_part
        b_total += tl.sum(tl.load(p_parts, mask=o_part < parts, other=0.0), 0)
    for index in range(tl.cdiv(stop - start, BLOCK)):
        # Tokens in descending order, so that a cumulative sum runs from the end of the chunk.
        o_t = stop - 1 - index * BLOCK - tl.arange(0, BLOCK)
        m_t = o_t >= start
        b_grad = -load_gates(p_k_dot_dk, o_t, m_t, groups, i_group)
        for i_repeat in range(REPEATS):
            b_grad += load_gates(p_q_dot_dq, o_t, m_t, groups * REPEATS, i_group * REPEATS + i_repeat)
        b_grad /= P
        counts = load_gates(p_log_g, o_t, m_t, groups, i_group).to(tl.float32) >= LOWEST
        b_grad_log_g = tl.where(counts, b_total + tl.cumsum(b_grad, 0), 0.0)
        tl.store(p_grad_log_g + o_t * groups + i_group, b_grad_log_g.to(p_grad_log_g.dtype.element_ty), mask=m_t)
        b_total += tl.sum(b_grad, 0)


@triton.jit
def grad_norm_kernel(
    p_out,
    p_grad_out,
    p_norm,
    p_inverse_norm,
    p_grad_norm,
    p_y,
    s_gt,
    s_gh,
    queries,
    heads,
    V: tl.constexpr,
    BV: tl.constexpr,
    BLOCK: tl.constexpr,
    WANT_Y: tl.constexpr,
):
    """Compute the gradients of numerator and denominator from that of the output, their quotient. BLOCK queries each.

    grad_out / norm is the gradient of the sum of weighted values, so that 1 / norm is all there is to keep of it.

    out: [tokens, H, V] contiguous, in.
    grad_out: [tokens, H, V] in, strides s_gt and s_gh.
    norm: [tokens, H] float32 in.
    inverse_norm: [tokens, H] float32 out: 1 / norm, and 0 where norm counts as 0.
    grad_norm: [tokens, H] float32 out: the gradient of norm, -<grad_out, out> / norm, and 0 where norm counts as 0.
    y: [tokens, H, V] contiguous, out, where WANT_Y: grad_out / norm.
    queries: tokens H. heads: H.
    """
    # Load.
    o_query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_v = tl.arange(0, BV)
    m_query = o_query < queries
    m_block = m_query[:, None] & (o_v < V)[None, :]
    p_rows = p_grad_out + (o_query // heads) * s_gt + (o_query % heads) * s_gh
    b_out = tl.load(p_out + o_query[:, None] * V + o_v[None, :], mask=m_block, other=0.0).to(tl.float32)
    b_grad_out = tl.load(p_rows[:, None] + o_v[None, :], mask=m_block, other=0.0).to(tl.float32)
    b_norm = tl.load(p_norm + o_query, mask=m_query, other=1.0)
    # Divide and store. A query that sees nothing has output 0, whatever it is divided by, and so norm no gradient.
    b_inverse_norm = 1.0 / divisor(b_norm)
    b_grad_norm = tl.where(tl.abs(b_norm) < SMALLEST, 0.0, -tl.sum(b_out * b_grad_out, 1) * b_inverse_norm)
    tl.store(p_inverse_norm + o_query, b_inverse_norm, mask=m_query)
    tl.store(p_grad_norm + o_query, b_grad_norm, mask=m_query)
    if WANT_Y:
        b_y = (b_grad_out * b_inverse_norm[:, None]).to(p_y.dtype.element_ty)
        tl.store(p_y + o_query[:, None] * V + o_v[None, :], b_y, mask=m_block)
