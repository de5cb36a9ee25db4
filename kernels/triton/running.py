"""Running sums over the chunks of a sequence: from what each chunk adds to the state before, or its gradient after, it.

The sums of single chunks come from kernels that work on all chunks at once. This one reads and writes each state once
and computes next to nothing, so that the memory's bandwidth bounds it. Legend: prologue.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from powerplan.kernels.triton.config import most_registers, operand
from powerplan.kernels.triton.features import rounded
from powerplan.kernels.triton.launches import Launches, StatePair
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import power_of_two
from powerplan.kernels.triton.prologue import chunk_bounds, divisor

RUNNING_BLOCK = 2048
"""Values of a program."""

WARPS, REGISTERS = 8, 80
"""Warps of a program, and most registers of a thread. Not told how many, ptxas takes 32 for some, and spills."""


@triton.jit
def add_up(
    i_program,
    p_parts,
    p_log_g_cumsum,
    p_start,
    p_states,
    p_end,
    p_forward,
    p_carry,
    p_chunks,
    p_first_chunk,
    p_steps,
    groups,
    blocks,
    size,
    pieces,
    step_size,
    carry_parts,
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
    """Add up one block of parts over the chunks of one sequence: program i_program of blocks N G (running_kernel)."""
    i_block = i_program % blocks
    i_state = i_program // blocks
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
    count = (stop_chunk - first_chunk).to(tl.int32)
    for index in range(count):
        i_chunk = first_chunk + index
        if BACKWARD:
            i_chunk = stop_chunk - 1 - index
        slot = i_chunk * groups + i_group
        if BACKWARD and GATED and index == 0:
            tl.store(p_carry + slot * carry_parts + i_block, 0.0)
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
                tl.store(p_carry + slot * carry_parts + i_block, b_carry)
        if WANT_END or index < count - 1:
            if GATED:
                _, stop = chunk_bounds(p_chunks, i_chunk)
                b_sum *= tl.exp(tl.load(p_log_g_cumsum + ((stop - 1) * groups + i_group) * 2))
            for i_piece in range(pieces):
                p_piece = p_parts + (slot * pieces + i_piece) * size
                b_sum += tl.load(p_piece + o_value, mask=m_value, other=0.0).to(tl.float32)
    if WANT_END:
        if not BACKWARD:
            b_sum *= weight
        tl.store(p_end + o_edge, b_sum, mask=m_edge)


@triton.jit
def running_kernel(
    p_parts,
    p_start,
    p_states,
    p_end,
    p_forward,
    p_key_parts,
    p_key_start,
    p_keys,
    p_key_end,
    p_key_forward,
    p_log_g_cumsum,
    p_carry,
    p_chunks,
    p_first_chunk,
    p_steps,
    programs,
    groups,
    blocks,
    size,
    pieces,
    step_size,
    key_blocks,
    key_size,
    key_pieces,
    first_part,
    carry_parts,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KEYED: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    KEY_OPERAND: tl.constexpr,
    KEY_PRECISION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_START: tl.constexpr,
    WANT_END: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Add up parts over the chunks of N sequences, each sum decayed by exp(a_M) a chunk.

    Grid: programs = blocks N G programs, and where KEYED key_blocks N G more, which add up key_parts likewise.

    Forward, slot c gets the sum of the chunks before c. Backward, that of the chunks after c; for the last chunk of a
    sequence that is zero and not written, unless there is a start.

    parts: [slots, G, pieces, size] bf16 or float32 in. A value's step is its index // step_size; its column, % PADDED.
    start: [N, G, size / PADDED COLUMNS] float32 in, where HAS_START: the initial state. Backward: the gradient of the
        final one. Columns from COLUMNS on are padding, which starts and ends have not got.
    states: [slots, G, size] out: forward the sum times the step's weight, where WEIGHTED. Backward the gradient of the
        sum without weights: it, too, times the weight.
    end: [N, G, size / PADDED COLUMNS] float32 out, where WANT_END: the final state, with weights. Backward: the
        gradient of the initial state with weights.
    forward: [slots, G, size] in, backward where GATED: states of the forward pass.
    key_parts, key_start, keys, key_end, key_forward: the same of the normaliser, [key_size] each, where KEYED: without
        weights and padding.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED.
    carry: [slots, G, carry_parts] float32 out, backward where GATED: <dS, S> of the state after the chunk, each
        program's part from first_part on, and 0 for the last chunk of a sequence. Those of keys come after those of
        states.
    chunks: [slots, 4] int64 in. first_chunk: [N + 1] int64 in. steps: [steps, P + 1] int32 in, where WEIGHTED.
    BLOCK: values of a program; where WEIGHTED it divides step_size.
    """
    i_program = tl.program_id(0)
    if i_program < programs:
        add_up(
            i_program,
            p_parts,
            p_log_g_cumsum,
            p_start,
            p_states,
            p_end,
            p_forward,
            p_carry + first_part,
            p_chunks,
            p_first_chunk,
            p_steps,
            groups,
            blocks,
            size,
            pieces,
            step_size,
            carry_parts,
            P,
            BLOCK,
            COLUMNS,
            PADDED,
            GATED,
            WEIGHTED,
            HAS_START,
            WANT_END,
            BACKWARD,
            OPERAND,
            PRECISION,
        )
    else:
        if KEYED:
            add_up(
                i_program - programs,
                p_key_parts,
                p_log_g_cumsum,
                p_key_start,
                p_keys,
                p_key_end,
                p_key_forward,
                p_carry + first_part + blocks,
                p_chunks,
                p_first_chunk,
                p_steps,
                groups,
                key_blocks,
                key_size,
                key_pieces,
                step_size,
                carry_parts,
                P,
                KEY_BLOCK,
                KEY_COLUMNS,
                KEY_COLUMNS,
                GATED,
                False,
                HAS_START,
                WANT_END,
                BACKWARD,
                KEY_OPERAND,
                KEY_PRECISION,
            )


class Summands(NamedTuple):
    """What is added up over the chunks of each sequence.

    parts: [slots, G, pieces, rows, padded columns], the sums of single chunks, in pieces
    start: [N, G, rows, columns] float32, or None
    forward: what `running_sums` returned first in the forward pass, for the backward pass; else None
    columns: the columns without padding
    stored: the dtype of the result
    memory: where the result is written to, [slots, G, rows, padded columns]; None for new memory
    """

    parts: Tensor
    start: Tensor | None
    forward: Tensor | None
    columns: int
    stored: torch.dtype
    memory: Tensor | None = None

    @property
    def size(self) -> int:
        """Values of a sum."""
        return self.parts.shape[-2] * self.parts.shape[-1]

    @property
    def block(self) -> int:
        """Values of a program."""
        return min(RUNNING_BLOCK, power_of_two(self.size))

    @property
    def blocks(self) -> int:
        """Programs for a sum."""
        return -(-self.size // self.block)


def running_sums(
    calls: Launches,
    of: Summands,
    of_keys: Summands | None,
    want_end: bool,
    backward: bool,
    carry: Tensor | None = None,
    first_part: int = 0,
) -> tuple[StatePair, StatePair, Tensor]:
    """Add up the sums of single chunks over each sequence, those of states and of their normalisers in one launch.

    Args:
        calls: The call's tensors.
        of: What is added up.
        of_keys: The normalisers, which have no padding; None where there is no second sum.
        want_end: Whether the sums at the other end are wanted.
        backward: Whether this is the backward pass.
        carry: [slots, G, parts], where <dS, S> goes, from part `first_part` on; None for a new tensor.
        first_part: See `carry`.

    Returns:
        The sums before (backward: after) all chunks, [slots, G, rows, padded columns]; the sums at the other end, [N,
        G, rows, columns]; and <dS, S> by chunk in parts, [slots, G, parts], backward with gates.
    """
    shape, call, absent = calls.shape, calls.shape.call, calls.placeholder
    groups, sequences = call.kv_heads, shape.sequences
    new = torch.empty if calls.dense else torch.zeros

    def results(each: Summands | None) -> tuple[Tensor, Tensor]:
        if each is None:
            return absent, absent
        slots, _, _, rows, padded = each.parts.shape
        states = each.memory
        if states is None:
            states = new((slots, groups, rows, padded), dtype=each.stored, device=calls.device)
        return states, calls.float((sequences, groups, rows, each.columns), want_end)

    (states, end), (keys, key_end) = results(of), results(of_keys)
    second = of if of_keys is None else of_keys
    parts = of.blocks + (0 if of_keys is None else of_keys.blocks)
    if carry is None:
        carry = calls.float((shape.chunk_slots, groups, parts), backward and calls.gated)
    rows, padded = of.parts.shape[-2:]
    # The normaliser's states are rounded by those who multiply them: <dS, S> takes them as they are.
    operand_type, precision, _ = operand(shape.dtype if rows == shape.rows else of.stored)
    key_operand, key_precision, _ = operand(second.stored)
    start, forward = of.start, of.forward
    arguments: dict[str, Any] = {
        "p_parts": of.parts,
        "p_start": absent if start is None else start,
        "p_states": states,
        "p_end": end,
        "p_forward": absent if forward is None else forward,
        "p_key_parts": absent if of_keys is None else of_keys.parts,
        "p_key_start": absent if of_keys is None or of_keys.start is None else of_keys.start,
        "p_keys": keys,
        "p_key_end": key_end,
        "p_key_forward": absent if of_keys is None or of_keys.forward is None else of_keys.forward,
        "p_log_g_cumsum": calls.log_g_cumsum,
        "p_carry": carry,
        "p_chunks": calls.chunk_table.chunks,
        "p_first_chunk": calls.chunk_table.first_chunk,
        "p_steps": calls.step_table,
        "programs": of.blocks * sequences * groups,
        "groups": groups,
        "blocks": of.blocks,
        "size": of.size,
        "pieces": of.parts.shape[2],
        "step_size": padded * 64,
        "key_blocks": second.blocks,
        "key_size": second.size,
        "key_pieces": second.parts.shape[2],
        "first_part": first_part,
        "carry_parts": carry.shape[-1],
        "P": call.p,
        "BLOCK": of.block,
        "COLUMNS": of.columns,
        "PADDED": padded,
        "OPERAND": operand_type,
        "PRECISION": precision,
        "WEIGHTED": shape.hopper and call.p > 1 and rows == shape.rows,
        "KEYED": of_keys is not None,
        "KEY_BLOCK": second.block,
        "KEY_COLUMNS": second.columns,
        "KEY_OPERAND": key_operand,
        "KEY_PRECISION": key_precision,
        "GATED": calls.gated,
        "HAS_START": start is not None,
        "WANT_END": want_end,
        "BACKWARD": backward,
    }
    launch(running_kernel, parts * sequences * groups, arguments, WARPS, options=most_registers(REGISTERS))
    return (states, keys), (end, key_end), carry
