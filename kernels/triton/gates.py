"""The gradient of log_g: the small kernel that ends a backward pass with gates. Legend: prologue.py."""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.prologue import LOWEST, chunk_bounds, load_gates


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
