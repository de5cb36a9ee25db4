"""The states before all chunks and the gradients of those after them: by walks over sequences, or chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerplan.kernels.triton.config import Blocks, operand
from powerplan.kernels.triton.launches import Launches, NormGrads, StatePair
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import step_rows
from powerplan.kernels.triton.running import running_sum
from powerplan.kernels.triton.scan import scan_kernel
from powerplan.kernels.triton.shapes import LaunchShape, each_chunk
from powerplan.kernels.triton.squares import squares_kernel
from powerplan.kernels.triton.tuning import tuned

FULL_GPU = 256
"""Programs that fill a GPU: two for each of an H100's 132 multiprocessors."""

MANY_CHUNKS = 4
"""Chunks of a sequence from which it pays to work on all at once: their sums are written, and read once more."""


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
        scan_states = _by_chunks if few_programs(shape) else _walk
    states, end, carry = scan_states(calls, x, v, start, want_end, norm_grads, forward_states)
    if shape.key_apart:
        key_start = None if start is None else start[1]
        forward_key = None if forward_states is None else forward_states[1]
        if shape.lower is None:
            found = _scan_squares(calls, x, key_start, want_end, norm_grads, forward_key)
        else:
            from powerplan.kernels.triton.hopper.run import scan_lower

            found = scan_lower(calls, x, key_start, want_end, norm_grads, forward_key)
        keys, end_key, key_carry = found
        if norm_grads is not None and calls.gated:
            carry = torch.cat((carry, key_carry), -1)
        return (states[0], keys), (end[0], end_key), carry
    return states, end, carry


def few_programs(shape: LaunchShape) -> bool:
    """Whether walks over whole sequences would leave most of a GPU idle: at p = 1 there is one for each head."""
    call = shape.call
    keyed = call.normalize and call.p != 2
    walks = shape.rows // (step_rows(call.head_dim, call.p) * shape.scan_steps) * shape.sequences * call.kv_heads
    return not keyed and walks < FULL_GPU and shape.chunk_slots >= MANY_CHUNKS * shape.sequences


def _by_chunks(
    calls: Launches,
    x: Tensor,
    v: Tensor,
    start: StatePair | None,
    want_end: bool,
    norm_grads: NormGrads | None,
    forward_states: StatePair | None,
) -> tuple[StatePair, StatePair, Tensor]:
    """`_walk` over all chunks at once, as if each were a sequence, and then a running sum."""
    _, (parts, _), _ = _walk(calls, x, v, None, True, norm_grads, None, each_its_own=True)
    start_kv = None if start is None else start[0]
    forward = None if forward_states is None else forward_states[0]
    backward, columns = norm_grads is not None, calls.shape.call.v_head_dim
    stored = operand(calls.shape.dtype)[2]
    states, end, carry = running_sum(calls, parts, start_kv, want_end, forward, backward, columns, stored)
    return (states, calls.placeholder), (end, calls.placeholder), carry


def _walk(
    calls: Launches,
    x: Tensor,
    v: Tensor,
    start: StatePair | None,
    want_end: bool,
    norm_grads: NormGrads | None,
    forward_states: StatePair | None,
    each_its_own: bool = False,
) -> tuple[StatePair, StatePair, Tensor]:
    """`scan` by one program for each sequence, group and block of rows; without the normaliser for p = 2.

    each_its_own: Whether each chunk counts as a sequence.
    """
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
    sequences = shape.chunk_slots if each_its_own else shape.sequences
    end_size = (sequences, *states.shape[1:])
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
        "p_first_chunk": each_chunk(sequences, calls.device) if each_its_own else calls.chunk_table.first_chunk,
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
        programs = state_blocks * sequences * call.kv_heads
        launch(scan_kernel, programs, arguments | {"BLOCK": blocks.rows}, blocks.warps, blocks.stages)

    start_with(tuned("scan", shape, start_with))
    return (states, keys), (end, end_key), grad_gate_carry


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
    # Products of float32 run outside the matrix unit, and are unrolled over the block.
    block = 16 if shape.dtype == torch.float32 else 64 if width <= 64 else 32
    warps = 8 if width > 64 or shape.dtype == torch.float32 else 4
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
        "BLOCK": block,
        "GATED": calls.gated,
        "BACKWARD": backward,
        "OPERAND": operand_type,
        "PRECISION": precision,
    }
    launch(squares_kernel, shape.chunk_slots * call.kv_heads, arguments, warps)
    return running_sum(calls, parts, start, want_end, forward, backward, width, shape.key_dtype)
