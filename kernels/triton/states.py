"""The states before all chunks and the gradients of those after them: by walks over sequences, or chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from powerplan.kernels.triton.config import Blocks, operand
from powerplan.kernels.triton.launches import Launches, StatePair
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import step_rows
from powerplan.kernels.triton.prepare import Prepared
from powerplan.kernels.triton.running import Summands, running_sums
from powerplan.kernels.triton.scan import scan_kernel
from powerplan.kernels.triton.shapes import LaunchShape, each_chunk
from powerplan.kernels.triton.tuning import tuned

FULL_GPU = 256
"""Programs that fill a GPU: two for each of an H100's 132 multiprocessors."""

MANY_CHUNKS = 4
"""Chunks of a sequence from which it pays to work on all at once: their sums are written, and read once more."""


def scan(
    calls: Launches,
    x: Tensor,
    v: Tensor,
    prepared: Prepared,
    start: StatePair | None,
    want_end: bool,
    forward_states: StatePair | None = None,
) -> tuple[StatePair, StatePair, Tensor]:
    """Sum the states of each sequence: forward over keys and values, or backward over queries and gradients.

    Args:
        calls: The call's tensors.
        x: [tokens, heads, K], the keys, or for the backward scan the queries.
        v: [tokens, heads, V], the values, or for the backward scan `NormGrads.y`.
        prepared: What `prepare` returned.
        start: The state that each sequence starts with, or the gradient of the one it ends with, [N, G, rows, V].
        want_end: Whether the state at the other end is wanted.
        forward_states: The states that the forward scan returned, for the backward scan only.

    Returns:
        The states before all chunks, or the gradients of those after them, [slots, G, rows, columns]; the state at the
        other end in float32, [N, G, rows, V]; and grad_gate_carry, [slots, G, parts], backward with gates. The gates of
        a chunk act on later tokens only through the state S after it: for each chunk but the last, grad_gate_carry
        holds the parts of that share of their gradient, <dS, S>; for the last it holds 0.
    """
    shape, backward = calls.shape, forward_states is not None
    start_kv, start_key = (None, None) if start is None else start
    forward_kv, forward_key = (None, None) if forward_states is None else forward_states
    keys = None
    if prepared.squares is not None:
        keys = Summands(prepared.squares, start_key, forward_key, shape.square_width, shape.key_dtype)
    if shape.hopper:
        from powerplan.kernels.triton.hopper.run import scan_chunks

        return scan_chunks(calls, x, v, prepared, start, want_end, forward_states, keys)
    if not few_programs(shape):
        return _walk(calls, x, v, prepared, start, want_end, forward_states, backward, keys)
    # All chunks at once, as if each were a sequence.
    _, (ends, _), _ = _walk(calls, x, v, prepared, None, True, None, backward, each_its_own=True)
    stored = operand(shape.dtype)[2]
    of = Summands(ends.unsqueeze(2), start_kv, forward_kv, shape.call.v_head_dim, stored)
    return running_sums(calls, of, keys, want_end, backward)


def few_programs(shape: LaunchShape) -> bool:
    """Whether walks over whole sequences would leave most of a GPU idle: at p = 1 there is one for each head."""
    call = shape.call
    keyed = call.normalize and call.p != 2
    walks = shape.rows // (step_rows(call.head_dim, call.p) * shape.scan_steps) * shape.sequences * call.kv_heads
    return not keyed and walks < FULL_GPU and shape.chunk_slots >= MANY_CHUNKS * shape.sequences


def _walk(
    calls: Launches,
    x: Tensor,
    v: Tensor,
    prepared: Prepared,
    start: StatePair | None,
    want_end: bool,
    forward_states: StatePair | None,
    backward: bool,
    squares: Summands | None = None,
    each_its_own: bool = False,
) -> tuple[StatePair, StatePair, Tensor]:
    """`scan` by one program for each sequence, group and block of rows.

    squares: The normaliser's sums of single chunks for p = 2, which are added up here.
    each_its_own: Whether each chunk counts as a sequence.
    """
    shape, call, absent = calls.shape, calls.shape.call, calls.placeholder
    keyed = call.normalize and call.p != 2
    inverse_norm, grad_norm, _ = prepared.norm_grads
    _, _, stored = operand(shape.dtype)
    size = (shape.chunk_slots, call.kv_heads, shape.rows)
    # Packed sequences may leave slots unused, which are saved with the others and must not be garbage.
    new = torch.empty if calls.dense else torch.zeros
    states = new(*size, call.v_head_dim, dtype=stored, device=calls.device)
    keys = new(size, dtype=torch.float32, device=calls.device) if keyed else absent
    sequences = shape.chunk_slots if each_its_own else shape.sequences
    end_size = (sequences, *states.shape[1:])
    end, end_key = calls.float(end_size, want_end), calls.float(end_size[:3], want_end and keyed)
    start_kv, start_key = (absent, absent) if start is None else start
    forward_kv, forward_key = (absent, absent) if forward_states is None else forward_states
    state_blocks = len(calls.step_table) // shape.scan_steps
    parts = state_blocks + (0 if squares is None else squares.blocks)
    carry = calls.float((*size[:2], parts), backward and calls.gated)
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
        "p_grad_gate_carry": carry,
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
        "carry_parts": parts,
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
        stages = 1 if shape.overwrites and not (calls.gated or backward) else blocks.stages
        launch(scan_kernel, programs, arguments | {"BLOCK": blocks.rows}, blocks.warps, stages)

    start_with(tuned("scan", shape, start_with))
    if squares is not None:
        (keys, _), (end_key, _), _ = running_sums(calls, squares, None, want_end, backward, carry, state_blocks)
    return (states, keys), (end, end_key), carry
