"""The small kernels: gates summed within chunks, and what the backward pass needs of the outputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gates_kernel(p_log_g, p_sums, p_chunks, groups, BLOCK: tl.constexpr):
    """sums[t, g] = sum of log_g from the start of t's chunk to t, in float32. log_g, sums [tokens, G] contiguous."""
    i_chunk = tl.program_id(0) // groups
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    start, stop = tl.load(p_chunks + i_chunk * 4), tl.load(p_chunks + i_chunk * 4 + 1)
    b_total = 0.0
    for first in range(start, stop, BLOCK):
        o_t = first + tl.arange(0, BLOCK)
        m_t = o_t < stop
        b_gate = tl.load(p_log_g + o_t * groups + i_group, mask=m_t, other=0.0).to(tl.float32)
        tl.store(p_sums + o_t * groups + i_group, b_total + tl.cumsum(b_gate, 0), mask=m_t)
        b_total += tl.sum(b_gate, 0)


@triton.jit
def gate_slopes_kernel(p_towards, p_reach, p_slopes, p_chunks, groups, BLOCK: tl.constexpr):
    """slopes[t, g] = reach[chunk, g] + sum of towards from t to the end of t's chunk: the gradient of log_g.

    towards [tokens, G], dL/da; reach [chunks, G], what the state after the chunk adds. Summing over a chunk and not
    over the sequence keeps the roundings of dq and dk, which cancel in exact arithmetic only, from adding up.
    """
    i_chunk = tl.program_id(0) // groups
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    start, stop = tl.load(p_chunks + i_chunk * 4), tl.load(p_chunks + i_chunk * 4 + 1)
    b_total = tl.load(p_reach + i_chunk * groups + i_group)
    for index in range(tl.cdiv(stop - start, BLOCK)):
        o_t = stop - 1 - index * BLOCK - tl.arange(0, BLOCK)
        m_t = o_t >= start
        b_towards = tl.load(p_towards + o_t * groups + i_group, mask=m_t, other=0.0)
        tl.store(p_slopes + o_t * groups + i_group, b_total + tl.cumsum(b_towards, 0), mask=m_t)
        b_total += tl.sum(b_towards, 0)


@triton.jit
def prepare_kernel(
    p_out,
    p_grad,
    p_norm,
    p_inverse,
    p_share,
    s_gt,
    s_gh,
    rows,
    heads,
    V: tl.constexpr,
    BV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the sums of weighted values and of the sums of weights, from that of their quotient.

    inverse = 1 / norm (1 where norm is 0) turns the gradient of the output into that of the weighted values;
    share = -<grad, out> / norm (0 where norm is 0) is that of the sum of weights. out [tokens, H, V] contiguous,
    grad with strides s_gt and s_gh, norm, inverse, share [tokens, H].
    """
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_v = tl.arange(0, BV)
    m_row = o_row < rows
    m_block = m_row[:, None] & (o_v < V)[None, :]
    p_rows = p_grad + (o_row // heads) * s_gt + (o_row % heads) * s_gh
    b_out = tl.load(p_out + o_row[:, None] * V + o_v[None, :], mask=m_block, other=0.0).to(tl.float32)
    b_grad = tl.load(p_rows[:, None] + o_v[None, :], mask=m_block, other=0.0).to(tl.float32)
    b_norm = tl.load(p_norm + o_row, mask=m_row, other=1.0)
    b_inverse = 1.0 / tl.where(b_norm == 0, 1.0, b_norm)
    b_share = tl.where(b_norm == 0, 0.0, -tl.sum(b_out * b_grad, 1) * b_inverse)
    tl.store(p_inverse + o_row, b_inverse, mask=m_row)
    tl.store(p_share + o_row, b_share, mask=m_row)
