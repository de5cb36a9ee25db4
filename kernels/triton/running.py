"""Running sums over the chunks of a sequence: from what each chunk adds to the state before, or its gradient after, it.

The sums of single chunks come from kernels that work on all chunks at once. This one reads and writes each state once
and computes next to nothing, so that the memory's bandwidth bounds it. Legend: prologue.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerplan.kernels.triton.prologue import chunk_bounds, divisor


@triton.jit
def running_kernel(
    p_parts,
    p_log_g_cumsum,
    p_start,
    p_states,
    p_end,
    p_forward,
    p_grad_gate_carry,
    p_chunks,
    p_first_chunk,
    p_steps,
    groups,
    blocks,
    size,
    step_size,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_START: tl.constexpr,
    WANT_END: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Add up parts over the chunks of N sequences, each sum decayed by exp(a_M) a chunk. Grid: blocks N G programs.

    Forward, slot c gets the sum of the chunks before c. Backward, that of the chunks after c; for the last chunk of a
    sequence that is zero and not written, unless there is a start.

    parts: [slots, G, size] bf16 or float32 in. A value's step is its index // step_size; its column, % PADDED.
    log_g_cumsum: [tokens, G] float32 in, where GATED.
    start: [N, G, size / PADDED COLUMNS] float32 in, where HAS_START: the initial state. Backward: the gradient of the
        final one. Columns from COLUMNS on are padding, which starts and ends have not got.
    states: [slots, G, size] out: forward the sum times the step's weight, where WEIGHTED. Backward the gradient of the
        sum without weights: it, too, times the weight.
    end: [N, G, size / PADDED COLUMNS] float32 out, where WANT_END: the final state, with weights. Backward: the
        gradient of the initial state with weights.
    forward: [slots, G, size] in, backward where GATED: states of the forward pass.
    grad_gate_carry: [slots, G, blocks] float32 out, backward where GATED, not for the last chunk of a sequence:
        <dS, S> of the state after the chunk, this program's part.
    chunks: [slots, 4] int64 in. first_chunk: [N + 1] int64 in. steps: [steps, P + 1] int32 in, where WEIGHTED.
    BLOCK: values of a program, which divides size and step_size.
    """
    i_block = tl.program_id(0) % blocks
    i_state = tl.program_id(0) // blocks
    i_sequence = i_state // groups
    i_group = (i_state % groups).to(tl.int64)
    o_value = i_block * BLOCK + tl.arange(0, BLOCK)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(p_steps + (i_block * BLOCK // step_size) * (P + 1) + P).to(tl.float32)
    # Starts and ends are not padded: value (row, column) lies at row COLUMNS + column.
    o_edge = i_state.to(tl.int64) * (size // PADDED * COLUMNS) + o_value // PADDED * COLUMNS + o_value % PADDED
    m_edge = o_value % PADDED < COLUMNS
    b_sum = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        b_sum = tl.load(p_start + o_edge, mask=m_edge, other=0.0)
        if not BACKWARD:
            b_sum /= divisor(weight)
    first_chunk, stop_chunk = tl.load(p_first_chunk + i_sequence), tl.load(p_first_chunk + i_sequence + 1)
    count = stop_chunk - first_chunk
    for index in range(count):
        i_chunk = first_chunk + index
        if BACKWARD:
            i_chunk = stop_chunk - 1 - index
        slot = i_chunk * groups + i_group
        if HAS_START or index > 0 or not BACKWARD:
            tl.store(p_states + slot * size + o_value, (b_sum * weight).to(p_states.dtype.element_ty))
            # The state after this chunk is the one before the next. Its own weights are in it.
            if BACKWARD and GATED and index > 0:
                b_forward = tl.load(p_forward + (slot + groups) * size + o_value).to(tl.float32)
                tl.store(p_grad_gate_carry + slot * blocks + i_block, tl.sum(b_forward * b_sum, 0))
        if WANT_END or index < count - 1:
            if GATED:
                _, stop = chunk_bounds(p_chunks, i_chunk)
                b_sum *= tl.exp(tl.load(p_log_g_cumsum + (stop - 1) * groups + i_group))
            b_sum += tl.load(p_parts + slot * size + o_value).to(tl.float32)
    if WANT_END:
        if not BACKWARD:
            b_sum *= weight
        tl.store(p_end + o_edge, b_sum, mask=m_edge)
