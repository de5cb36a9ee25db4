"""Launches the kernels of this folder: the states of all chunks, and what they add to out, dq, dk and dv."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from powerplan.kernels.triton.hopper.copies import copy_kernel, widen_kernel
from powerplan.kernels.triton.hopper.expand import expand_kernel
from powerplan.kernels.triton.hopper.layouts import tile_layout
from powerplan.kernels.triton.hopper.states import states_kernel
from powerplan.kernels.triton.launches import Launches, NormGrads, StatePair
from powerplan.kernels.triton.layout import TILE, padded_dim
from powerplan.kernels.triton.shapes import launch

BLOCK = 64
"""Tokens of a block of the copies and of the sums over chunks."""

STEP = TILE * TILE
"""Rows of a step of phi."""


def expand_blocks(columns: int, chunk_size: int) -> tuple[int, int, int]:
    """Return the tokens of a program of `expand_kernel`, its warps, and the tiles of its ring."""
    if chunk_size <= 64:
        return 64, 4, 4
    return (128, 8, 4) if columns == 128 else (128, 4, 4)


def states_blocks(columns: int) -> tuple[int, int]:
    """Return the tokens of a block of `states_kernel`, and the blocks of its rings."""
    return BLOCK, 3


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Return the descriptor of x [..., columns] as [all rows, columns], read in tiles of `rows` full rows."""
    return TensorDescriptor.from_tensor(x.flatten(0, -2), [rows, x.shape[-1]], tile_layout(x.shape[-1]))


def scan_states(
    calls: Launches,
    x: Tensor,
    v: Tensor,
    start: StatePair | None,
    want_end: bool,
    norm_grads: NormGrads | None,
    forward_states: StatePair | None,
) -> tuple[StatePair, StatePair, Tensor]:
    """Return what `states.scan` does, but for the normaliser: sums of single chunks, then a running sum."""
    from powerplan.kernels.triton.states import running_sum

    shape, call = calls.shape, calls.shape.call
    backward = norm_grads is not None
    repeats = call.heads_per_kv_head if backward else 1
    width, columns = shape.phi_width, shape.stored_columns
    chunk = -(-min(call.chunk_size, call.tokens) // BLOCK) * BLOCK
    copies = (shape.chunk_slots, call.kv_heads * repeats)
    xt = x.new_empty(*copies, width, chunk)
    y = x.new_empty(*copies, chunk, columns)
    arguments: dict[str, Any] = {
        "p_x": x,
        "p_y": v,
        "p_log_g_cumsum": calls.log_g_cumsum,
        "p_inverse_norm": calls.placeholder if norm_grads is None else norm_grads[0],
        "p_chunks": calls.chunk_table.chunks,
        "p_xt": xt,
        "p_y_copy": y,
        "s_xt": x.stride(0),
        "s_xh": x.stride(1),
        "s_yt": v.stride(0),
        "s_yh": v.stride(1),
        "groups": call.kv_heads,
        "token_blocks": chunk // BLOCK,
        "chunk": chunk,
        "power_scale": calls.power_scale,
        "DIM_X": call.head_dim,
        "DIM_Y": call.v_head_dim,
        "PADDED_X": width,
        "PADDED_Y": columns,
        "REPEATS": repeats,
        "BLOCK": BLOCK,
        "GATED": calls.gated,
        "BACKWARD": backward,
        "SCALED": backward and call.normalize,
    }
    launch(copy_kernel, copies[0] * copies[1] * chunk // BLOCK, arguments)
    share = min(width // TILE // 2, 256 // columns)
    parts = x.new_empty(shape.chunk_slots, call.kv_heads, shape.rows, columns)
    block, stages = states_blocks(columns)
    xt_tiles = TensorDescriptor.from_tensor(xt.flatten(0, -2), [TILE, block], tile_layout(block))
    arguments = {
        "xt_desc": xt_tiles,
        "y_desc": _tiles(y, block),
        "p_chunks": calls.chunk_table.chunks,
        "p_parts": parts,
        "groups": call.kv_heads,
        "chunk": chunk,
        "REPEATS": repeats,
        "TILES_X": width // TILE,
        "V": columns,
        "SHARE": share,
        "BT": block,
        "STAGES": stages,
    }
    launch(states_kernel, shape.chunk_slots * call.kv_heads * (shape.rows // STEP // share), arguments)
    start_kv = None if start is None else start[0]
    forward = None if forward_states is None else forward_states[0]
    states, end, carry = running_sum(
        calls, parts, start_kv, want_end, forward, backward, call.v_head_dim, x.dtype
    )
    return (states, calls.placeholder), (end, calls.placeholder), carry


@dataclass(frozen=True)
class Side:
    """One side of the products with a state.

    x, y: [tokens, heads, dim], the tensors whose outer product is taken; y is None where it is x.
    y_factor: [tokens, heads], what y is multiplied by, or None.
    of_keys: Whether x are keys, which the state after the chunk acts on.
    has_edge: Whether the first chunk (of_keys: the last) of a sequence has such a state, too.
    """

    x: Tensor
    y: Tensor | None
    y_factor: Tensor | None
    of_keys: bool
    has_edge: bool


def _part(calls: Launches, side: Side, states: Tensor) -> Tensor:
    """Return the state's part of one result, [tokens, heads, V] where y is x, else [tokens, heads, K]."""
    shape, call = calls.shape, calls.shape.call
    x, y = side.x, side.x if side.y is None else side.y
    symmetric = side.y is None
    dim = call.v_head_dim if symmetric else call.head_dim
    columns = padded_dim(dim)
    part = torch.empty(*x.shape[:2], dim, dtype=torch.float32, device=calls.device)
    rows, warps, stages = expand_blocks(columns, call.chunk_size)
    blocks = -(-min(call.chunk_size, call.tokens) // rows)
    arguments: dict[str, Any] = {
        "b_desc": _tiles(states, STEP),
        "p_x": x,
        "p_y": y,
        "p_y_factor": calls.placeholder if side.y_factor is None else side.y_factor,
        "p_log_g_cumsum": calls.log_g_cumsum,
        "p_chunks": calls.chunk_table.chunks,
        "p_part": part,
        "s_xt": x.stride(0),
        "s_xh": x.stride(1),
        "s_yt": y.stride(0),
        "s_yh": y.stride(1),
        "groups": call.kv_heads,
        "token_blocks": blocks,
        "power_scale": 1.0 if side.of_keys else calls.power_scale,
        "DIM_X": x.shape[2],
        "DIM_Y": y.shape[2],
        "DIM": dim,
        "TILES_X": shape.phi_width // TILE,
        "TILES_Y": shape.stored_columns // TILE,
        "N": columns,
        "REPEATS": x.shape[1] // call.kv_heads,
        "BM": rows,
        "STAGES": stages,
        "SYMMETRIC": symmetric,
        "OF_KEYS": side.of_keys,
        "GATED": calls.gated,
        "SCALED": side.y_factor is not None,
        "HAS_START": side.has_edge,
    }
    launch(expand_kernel, shape.chunk_slots * x.shape[1] * blocks, arguments, warps)
    return part


def output_part(calls: Launches, states: Tensor, has_start: bool) -> Tensor:
    """Return the part of out from the states before the chunks, [tokens, H, V] float32, not normalised."""
    return _part(calls, Side(calls.q, None, None, False, has_start), states)


def gradient_parts(
    calls: Launches,
    grad: Tensor,
    norm_grads: NormGrads,
    states: Tensor,
    grad_states: Tensor,
    has_start: bool,
    has_end: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of dq, dk and dv that go through states, in float32, without the normaliser's.

    Args:
        calls: The call's tensors.
        grad: [tokens, H, V], the gradient of the output.
        norm_grads: What `Launches.norm_grads` returned.
        states: [slots, G, rows, columns], the states before the chunks.
        grad_states: The same size, the gradients of the states after the chunks.
        has_start: Whether there is a state before the first chunk of a sequence.
        has_end: Whether there is a gradient of the state after the last chunk.
    """
    inverse_norm = norm_grads[0] if calls.shape.call.normalize else None
    dq = _part(calls, Side(calls.q, grad, inverse_norm, False, has_start), _widened(calls, states))
    dk = _part(calls, Side(calls.k, calls.v, None, True, has_end), _widened(calls, grad_states))
    return dq, dk, _part(calls, Side(calls.k, None, None, True, has_end), grad_states)


def _widened(calls: Launches, states: Tensor) -> Tensor:
    """Return states of unordered pairs of tiles as states of all pairs, [slots, G, K V, K] with padded dims."""
    width, columns = calls.shape.phi_width, calls.shape.stored_columns
    wide = states.new_empty(*states.shape[:2], width * columns, width)
    block = min(columns, 4096 // width)
    arguments = {"p_states": states, "p_wide": wide, "TILES": width // TILE, "V": columns, "BLOCK": block}
    programs = states.shape[0] * states.shape[1] * (width // TILE) * (columns // block)
    launch(widen_kernel, programs, arguments, 8)
    return wide
