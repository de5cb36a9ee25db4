"""Running sums over the chunks of a sequence: from what each chunk adds to the state before, or its gradient after, it.

The sums of single chunks come from kernels that work on all chunks at once. This one reads and writes each state once
and computes next to nothing, so that the memory's bandwidth bounds it. Legend: prologue.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from powerplan.kernels.triton.config import operand
from powerplan.kernels.triton.features import rounded
from powerplan.kernels.triton.launches import Launches
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import power_of_two
from powerplan.kernels.triton.prologue import chunk_bounds, divisor

RUNNING_BLOCK = 2048
"""Values of a program, 16 for each of 128 threads."""


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
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add up parts over the chunks of N sequences, each sum decayed by exp(a_M) a chunk. Grid: blocks N G programs.

    Forward, slot c gets the sum of the chunks before c. Backward, that of the chunks after c; for the last chunk of a
    sequence that is zero and not written, unless there is a start.

    parts: [slots, G, size] bf16 or float32 in. A value's step is its index // step_size; its column, % PADDED.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED.
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
    BLOCK: values of a program; where WEIGHTED it divides step_size.
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
    m_value = o_value < size
    m_edge = m_value & (o_value % PADDED < COLUMNS)
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
            # Rounded once, here, as an operand of the kernels that read it.
            b_stored = rounded(b_sum * weight, OPERAND, PRECISION).to(p_states.dtype.element_ty)
            tl.store(p_states + slot * size + o_value, b_stored, mask=m_value)
            # The state after this chunk is the one before the next. Its own weights are in it.
            if BACKWARD and GATED and index > 0:
                b_forward = tl.load(p_forward + (slot + groups) * size + o_value, mask=m_value, other=0.0).to(
                    tl.float32
                )
                b_carry = tl.sum(b_forward.to(tl.float32) * b_sum, 0)
                tl.store(p_grad_gate_carry + slot * blocks + i_block, b_carry)
        if WANT_END or index < count - 1:
            if GATED:
                _, stop = chunk_bounds(p_chunks, i_chunk)
                b_sum *= tl.exp(tl.load(p_log_g_cumsum + ((stop - 1) * groups + i_group) * 2))
            b_sum += tl.load(p_parts + slot * size + o_value, mask=m_value, other=0.0).to(tl.float32)
    if WANT_END:
        if not BACKWARD:
            b_sum *= weight
        tl.store(p_end + o_edge, b_sum, mask=m_edge)


def running_sum(
    calls: Launches,
    parts: Tensor,
    start: Tensor | None,
    want_end: bool,
    forward: Tensor | None,
    backward: bool,
    columns: int,
    stored: torch.dtype,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the sums of single chunks over each sequence.

    Args:
        calls: The call's tensors.
        parts: [slots, G, rows, padded columns], the sums of single chunks.
        start: [N, G, rows, columns] float32, or None.
        want_end: Whether the sum at the other end is wanted.
        forward: What this returned first in the forward pass, for the backward pass.
        backward: Whether this is the backward pass.
        columns: The columns without padding.
        stored: The dtype of the result.
        states: Where the result is written to; None for new memory.

    Returns:
        The sums before (backward: after) all chunks, of the size of parts; the sum at the other end, [N, G, rows,
        columns]; and <dS, S> by chunk in parts, [slots, G, blocks], backward with gates.
    """
    shape, call = calls.shape, calls.shape.call
    slots, groups, rows, padded = parts.shape
    size = rows * padded
    weighted = shape.hopper and call.p > 1 and rows == shape.rows
    block = min(RUNNING_BLOCK, power_of_two(size))
    blocks = -(-size // block)
    # The normaliser's states are rounded by those who multiply them: <dS, S> takes them as they are.
    operand_type, precision, _ = operand(shape.dtype if rows == shape.rows else stored)
    if states is None:
        new = torch.empty if calls.dense else torch.zeros
        states = new(parts.shape, dtype=stored, device=calls.device)
    end = calls.float((shape.sequences, groups, rows, columns), want_end)
    carry = calls.placeholder
    if backward and calls.gated:
        carry = torch.zeros(slots, groups, blocks, dtype=torch.float32, device=calls.device)
    arguments = {
        "p_parts": parts,
        "p_log_g_cumsum": calls.log_g_cumsum,
        "p_start": calls.placeholder if start is None else start,
        "p_states": states,
        "p_end": end,
        "p_forward": calls.placeholder if forward is None else forward,
        "p_grad_gate_carry": carry,
        "p_chunks": calls.chunk_table.chunks,
        "p_first_chunk": calls.chunk_table.first_chunk,
        "p_steps": calls.step_table,
        "groups": groups,
        "blocks": blocks,
        "size": size,
        "step_size": padded * 64,
        "P": call.p,
        "BLOCK": block,
        "COLUMNS": columns,
        "PADDED": padded,
        "GATED": calls.gated,
        "WEIGHTED": weighted,
        "HAS_START": start is not None,
        "WANT_END": want_end,
        "BACKWARD": backward,
        "OPERAND": operand_type,
        "PRECISION": precision,
    }
    launch(running_kernel, blocks * shape.sequences * groups, arguments)
    return states, end, carry
