"""Sums of x y^T over each chunk, all chunks at once: what the chunk's tokens add to the state for p = 1.

phi(x) is x there, and a chunk of keys and values is read once for a state of K x V: memory bounds this kernel, which is
plain Triton. What queries a state is one product in the kernels of attention within the chunk. The running sum over
chunks is another kernel's (running.py). Legend: ../prologue.py.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from powerplan.kernels.triton.config import operand
from powerplan.kernels.triton.launches import Launches
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.prologue import chunk_bounds, load_columns, load_sum, load_sums, token_block

BLOCK = 64
"""Tokens that a product sums over."""


@triton.jit
def sums_kernel(
    p_x,
    p_y,
    p_log_g_cumsum,
    p_chunks,
    p_parts,
    s_xt,
    s_xh,
    s_yt,
    s_yh,
    groups,
    power_scale,
    DIM_X: tl.constexpr,
    DIM_Y: tl.constexpr,
    PADDED_X: tl.constexpr,
    PADDED_Y: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    BACKWARD: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Sum x y^T of each chunk, each token times its factor. Grid: slots G programs.

    x, y are keys and values, and the factor is exp(a_M - a_t). Backward they are queries and gradients of weighted
    sums, and it is exp(a_t) scale.

    x: [tokens, heads, DIM_X] in. y: [tokens, heads, DIM_Y] in.
    log_g_cumsum: [tokens, G, 2] float32 in, where GATED.
    chunks: [slots, 4] int64 in.
    parts: [slots, G, PADDED_X, PADDED_Y] float32 out. Zeros for a slot without tokens.
    REPEATS: heads of a group in x and y: 1 forward. BLOCK: tokens that a product sums over.
    """
    i_chunk = (tl.program_id(0) // groups).to(tl.int64)
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    start, stop = chunk_bounds(p_chunks, i_chunk)
    if GATED and not BACKWARD:
        b_total, b_total_rest = load_sum(p_log_g_cumsum, tl.maximum(stop - 1, 0), groups, i_group)
    b_sum = tl.zeros([PADDED_X, PADDED_Y], tl.float32)
    token_blocks = tl.cdiv(stop - start, BLOCK)
    for i_block in range(token_blocks * REPEATS):
        i_head = i_group * REPEATS + i_block // token_blocks
        o_t, m_t = token_block(start + (i_block % token_blocks) * BLOCK, stop, BLOCK)
        b_x = load_columns(p_x + i_head * s_xh, s_xt, o_t, m_t, 0, DIM_X, PADDED_X)
        b_y = load_columns(p_y + i_head * s_yh, s_yt, o_t, m_t, 0, DIM_Y, PADDED_Y)
        if GATED or BACKWARD:
            b_factor = tl.full([BLOCK], power_scale if BACKWARD else 1.0, tl.float32)
            if GATED:
                b_cumsum, b_rest = load_sums(p_log_g_cumsum, o_t, m_t, groups, i_group)
                b_factor *= tl.exp(b_cumsum if BACKWARD else (b_total - b_cumsum) + (b_total_rest - b_rest))
            b_y = (b_y.to(tl.float32) * b_factor[:, None]).to(p_y.dtype.element_ty)
        # [PADDED_X, BLOCK] @ [BLOCK, PADDED_Y] -> [PADDED_X, PADDED_Y]
        b_sum = tl.dot(tl.trans(b_x.to(OPERAND)), b_y.to(OPERAND), b_sum, input_precision="ieee")
    o_x, o_y = tl.arange(0, PADDED_X), tl.arange(0, PADDED_Y)
    p_rows = p_parts + (i_chunk * groups + i_group) * (PADDED_X * PADDED_Y) + o_x * PADDED_Y
    tl.store(p_rows[:, None] + o_y[None, :], b_sum)


def chunk_sums(calls: Launches, x: Tensor, y: Tensor, backward: bool) -> Tensor:
    """Return what the tokens of each chunk add to the state for p = 1, [slots, G, padded K, padded V] in float32.

    Products of 16-bit keys and values are exact in float32, and the definition's final state keeps them: 16-bit sums of
    chunks, which do for phi (p = 2), would put a state without gates 300 times out of the error budget.

    Args:
        calls: The call's tensors.
        x: [tokens, heads, K], the keys; backward the queries.
        y: [tokens, heads, V], the values; backward the gradients of the weighted sums.
        backward: Whether this is the backward pass.
    """
    shape, call = calls.shape, calls.shape.call
    width, columns = shape.phi_width, shape.stored_columns
    parts = calls.float((shape.chunk_slots, call.kv_heads, width, columns), True)
    arguments: dict[str, Any] = {
        "p_x": x,
        "p_y": y,
        "p_log_g_cumsum": calls.log_g_cumsum,
        "p_chunks": calls.chunk_table.chunks,
        "p_parts": parts,
        "s_xt": x.stride(0),
        "s_xh": x.stride(1),
        "s_yt": y.stride(0),
        "s_yh": y.stride(1),
        "groups": call.kv_heads,
        "power_scale": calls.power_scale,
        "DIM_X": call.head_dim,
        "DIM_Y": call.v_head_dim,
        "PADDED_X": width,
        "PADDED_Y": columns,
        "REPEATS": call.heads_per_kv_head if backward else 1,
        "BLOCK": BLOCK,
        "GATED": calls.gated,
        "BACKWARD": backward,
        "OPERAND": operand(shape.dtype)[0],
    }
    warps = 8 if width * columns > 64 * 128 else 4
    launch(sums_kernel, shape.chunk_slots * call.kv_heads, arguments, warps, stages=3)
    return parts
