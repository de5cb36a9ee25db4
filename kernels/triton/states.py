"""The states before all chunks and the gradients of those after them, by one walk over each sequence or chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerplan.kernels.triton.config import Blocks, operand
from powerplan.kernels.triton.launches import Launches, NormGrads, StatePair
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import step_rows
from powerplan.kernels.triton.running import running_kernel
from powerplan.kernels.triton.scan import scan_kernel
from powerplan.kernels.triton.squares import squares_kernel
from powerplan.kernels.triton.tuning import tuned

RUNNING_BLOCK = 2048
"""Values of a program of the running sum, 16 for each of 128 threads."""


def scan(
    calls: Launches,
    x: Tensor,
    v: Tensor,
    start: StatePair | None,
    want_end: bool,
    norm_grads: NormGrads | None = None,
    forward_states: StatePair | None = None,
) -> tuple[StatePair, StatePair, Tensor]:
    """Sum the states of each sequence: forward over keys and values, or backward over queries and gradients.

    Args:
        calls: The call's tensors.
        x: [tokens, heads, K], the keys, or for the backward scan the queries.
        v: [tokens, heads, V], the values, or for the backward scan the gradient of the output.
        start: The state that each sequence starts with, or the gradient of the one it ends with, [N, G, rows, V].
        want_end: Whether the state at the other end is wanted.
        norm_grads: What `Launches.norm_grads` returned, for the backward scan only.
        forward_states: The states that the forward scan returned, for the backward scan only.

    Returns:
        The states before all chunks, or the gradients of those after them, [slots, G, rows, columns]; the state at the
        other end in float32, [N, G, rows, V]; and grad_gate_carry, [slots, G, parts], backward with gates. The gates of
        a chunk act on later tokens only through the state S after it: for each chunk but the last, grad_gate_carry
        holds the parts of that share of their gradient, <dS, S>; for the last it holds 0.
    """
    shape = calls.shape
    if shape.hopper:
        from powerplan.kernels.triton.hopper.run import scan_states
    else:
        scan_states = _walk
    states, end, carry = scan_states(calls, x, v, start, want_end, norm_grads, forward_states)
    if shape.call.normalize and shape.call.p == 2:
        key_start = None if start is None else start[1]
        forward_key = None if forward_states is None else forward_states[1]
        keys, end_key, key_carry = _scan_squares(calls, x, key_start, want_end, norm_grads, forward_key)
        if norm_grads is not None and calls.gated:
            carry = torch.cat((carry, key_carry), -1)
        return (states[0], keys), (end[0], end_key), carry
    return states, end, carry


def _walk(
    calls: Launches,
    x: Tensor,
    v: Tensor,
    start: StatePair | None,
    want_end: bool,
    norm_grads: NormGrads | None,
    forward_states: StatePair | None,
) -> tuple[StatePair, StatePair, Tensor]:
    """`scan` by one program for each sequence, group and block of rows; without the normaliser for p = 2."""
    shape, call, absent = calls.shape, calls.shape.call, calls.placeholder
    keyed = call.normalize and call.p != 2
    backward = norm_grads is not None
    inverse_norm, grad_norm = (absent, absent) if norm_grads is None else norm_grads[:2]
    _, _, stored = operand(shape.dtype)
    size = (shape.chunk_slots, call.kv_heads, shape.rows)
    # Packed sequences may leave slots unused, which are saved with the others and must not be garbage.
    new = torch.empty if calls.dense else torch.zeros
    states = new(*size, call.v_head_dim, dtype=stored, device=calls.device)
    keys = new(size if keyed else (1,), dtype=torch.float32, device=calls.device)
    end_size = (shape.sequences, *states.shape[1:])
    end, end_key = calls.float(end_size, want_end), calls.float(end_size[:3], want_end and keyed)
    start_kv, start_key = (absent, absent) if start is None else start
    forward_kv, forward_key = (absent, absent) if forward_states is None else forward_states
    state_blocks = len(calls.step_table) // shape.scan_steps
    grad_gate_carry = absent
    if backward and calls.gated:
        grad_gate_carry = torch.zeros(*size[:2], state_blocks, dtype=torch.float32, device=calls.device)
    arguments = {
        "p_x": x,
        "p_v": v,
        "p_log_g_cumsum": calls.log_g_cumsum,
        "p_inverse_norm": inverse_norm,
        "p_grad_norm": grad_norm,
        "p_start_kv": start_kv,
        "p_start_key": start_key,
        "p_state_kv": states,
        "p_state_key": keys,
        "p_end_kv": end,
        "p_end_key": end_key,
        "p_forward_kv": forward_kv,
        "p_forward_key": forward_key,
        "p_grad_gate_carry": grad_gate_carry,
        "p_chunks": calls.chunk_table.chunks,
        "p_first_chunk": calls.chunk_table.first_chunk,
        "p_steps": calls.step_table,
        "s_xt": x.stride(0),
        "s_xh": x.stride(1),
        "s_vt": v.stride(0),
        "s_vh": v.stride(1),
        "groups": call.kv_heads,
        "state_blocks": state_blocks,
        "rows": shape.rows,
        "power_scale": calls.power_scale,
        "STEPS": shape.scan_steps,
        "STEP_ROWS": step_rows(call.head_dim, call.p),
        "GATED": calls.gated,
        "HAS_START": start is not None,
        "WANT_END": want_end,
        "BACKWARD": backward,
    } | shape.constants()
    # Keys and values come one to a group; queries and gradients, one for each head of the group.
    arguments["REPEATS"] = call.heads_per_kv_head if backward else 1
    arguments["KEYED"] = keyed

    def start_with(blocks: Blocks) -> None:
        programs = state_blocks * shape.sequences * call.kv_heads
        launch(scan_kernel, programs, arguments | {"BLOCK": blocks.rows}, blocks.warps, blocks.stages)

    start_with(tuned("scan", shape, start_with))
    return (states, keys), (end, end_key), grad_gate_carry


def running_sum(
    calls: Launches,
    parts: Tensor,
    start: Tensor | None,
    want_end: bool,
    forward: Tensor | None,
    backward: bool,
    columns: int,
    stored: torch.dtype,
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

    Returns:
        The sums before (backward: after) all chunks, of the size of parts; the sum at the other end, [N, G, rows,
        columns]; and <dS, S> by chunk in parts, [slots, G, blocks], backward with gates.
    """
    shape, call = calls.shape, calls.shape.call
    slots, groups, rows, padded = parts.shape
    size = rows * padded
    weighted = shape.hopper and rows == shape.rows
    block = min(RUNNING_BLOCK, size)
    blocks = size // block
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
    }
    launch(running_kernel, blocks * shape.sequences * groups, arguments)
    return states, end, carry


def _scan_squares(
    calls: Launches,
    x: Tensor,
    start: Tensor | None,
    want_end: bool,
    norm_grads: NormGrads | None,
    forward: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum Z = sum k k^T, the normaliser's state for p = 2, or its gradient, as `scan` does the states."""
    shape, call = calls.shape, calls.shape.call
    backward = norm_grads is not None
    width = shape.square_width
    parts = torch.empty(shape.chunk_slots, call.kv_heads, width, width, dtype=torch.float32, device=calls.device)
    operand_type, precision, _ = operand(shape.dtype)
    arguments: dict[str, Any] = {
        "p_x": x,
        "p_log_g_cumsum": calls.log_g_cumsum,
        "p_grad_norm": calls.placeholder if norm_grads is None else norm_grads.grad_norm,
        "p_chunks": calls.chunk_table.chunks,
        "p_parts": parts,
        "s_xt": x.stride(0),
        "s_xh": x.stride(1),
        "groups": call.kv_heads,
        "power_scale": calls.power_scale,
        "K": call.head_dim,
        "BK": width,
        "REPEATS": call.heads_per_kv_head if backward else 1,
        "BLOCK": 64 if width <= 64 else 32,
        "GATED": calls.gated,
        "BACKWARD": backward,
        "OPERAND": operand_type,
        "PRECISION": precision,
    }
    launch(squares_kernel, shape.chunk_slots * call.kv_heads, arguments, 4 if width <= 64 else 8)
    return running_sum(calls, parts, start, want_end, forward, backward, width, shape.key_dtype)
