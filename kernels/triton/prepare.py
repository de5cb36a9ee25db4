"""What a pass does before its first product, in one launch: one program for some blocks of tokens of a chunk and head.

Sums of gates; backward the gradients of the quotient that the output is; for P = 2 sums of x x^T, the normaliser's
state or its gradient; and for the kernels of hopper/ the copies that they read by TMA. Each of these reads few bytes a
token and computes little. In one launch a token's values are read once, and the host starts one kernel instead of four.

phi(q).phi(k) = (q.k)^2 = q^T (k k^T) q, so that the normaliser needs Z = sum k k^T, [K, K], and no sum of phi(k).
Legend: prologue.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from powerplan.kernels.triton.config import most_registers, operand
from powerplan.kernels.triton.features import fine_product
from powerplan.kernels.triton.launches import Launches, NormGrads
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import padded_dim, power_of_two
from powerplan.kernels.triton.prologue import (
    LOWEST,
    SMALLEST,
    chunk_bounds,
    divisor,
    load_columns,
    load_gates,
    token_block,
)
from powerplan.kernels.triton.shapes import LaunchShape

SPAN = 512
"""Tokens of a program where it sums squares: one sum of 16 KB (K = 64) for 64 KB of keys and more that it reads."""

SHORT_SPAN = 256
"""Tokens of a program that sums none."""

BLOCK = 64
"""Tokens of a block of the copies; a chunk in them is a multiple of it."""


@triton.jit
def load_log_g(p_log_g, o_t, m_t, groups, i_group):
    """Load log_g of tokens o_t in float64; 0 where masked."""
    b_log_g = load_gates(p_log_g, o_t, m_t, groups, i_group).to(tl.float64)
    return tl.where(b_log_g < LOWEST, LOWEST, b_log_g)  # and not tl.maximum, which makes a number of NaN


@triton.jit
def in_words(b_sum):
    """Return a float64 sum as two float32 words: the sum, and what rounding left of it."""
    b_word = b_sum.to(tl.float32)
    return b_word, (b_sum - b_word.to(tl.float64)).to(tl.float32)


@triton.jit
def prepare_kernel(
    p_x,
    p_y,
    p_log_g,
    p_out,
    p_norm,
    p_chunks,
    p_log_g_cumsum,
    p_inverse_norm,
    p_grad_norm,
    p_divided,
    p_xt,
    p_y_copy,
    p_squares,
    s_xt,
    s_xh,
    s_yt,
    s_yh,
    groups,
    spans,
    blocks,
    token_blocks,
    power_scale,
    DIM_X: tl.constexpr,
    DIM_Y: tl.constexpr,
    PADDED_X: tl.constexpr,
    PADDED_Y: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATES: tl.constexpr,
    GATED: tl.constexpr,
    BACKWARD: tl.constexpr,
    QUOTIENT: tl.constexpr,
    DIVIDE: tl.constexpr,
    COPY: tl.constexpr,
    SQUARES: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Prepare `blocks` blocks of BLOCK tokens of a chunk and head. Grid: slots heads spans programs.

    Forward x and y are keys and values, and a token's factor is exp(a_M - a_t). Backward they are queries and gradients
    of the output, and it is exp(a_t) scale^P. grad_out / norm is the gradient of the sum of weighted values.

    x: [tokens, heads, DIM_X] in, where COPY or SQUARES.
    y: [tokens, heads, DIM_Y] in, where COPY or QUOTIENT.
    log_g: [tokens, G] contiguous, in, where GATED. Values below LOWEST count as LOWEST.
    out: [tokens, H, DIM_Y] contiguous, in, and norm: [tokens, H] float32 in, where QUOTIENT (backward).
    chunks: [slots, 4] int64 in.
    log_g_cumsum: [tokens, G, 2] float32 out, where GATED: sums of log_g from the chunk's start to each token, summed in
        float64, and what rounding to float32 left of them.
    inverse_norm: [tokens, H] float32 out, where QUOTIENT and not DIVIDE: 1 / norm, and 0 where norm counts as 0.
    grad_norm: [tokens, H] float32 out, where QUOTIENT: the gradient of norm, -<grad_out, out> / norm, and 0 where norm
        counts as 0.
    divided: [tokens, H, DIM_Y] contiguous, out, where DIVIDE: grad_out / norm.
    xt: [slots, heads, PADDED_X, token_blocks BLOCK] out, where COPY: x with time last. y_copy: [slots, heads,
        token_blocks BLOCK, PADDED_Y] out: y (or grad_out / norm) times the token's factor. Both are 0 for tokens past
        the chunk's end, and for features that are padding. The factor goes into y: x is multiplied by itself.
    squares: [slots, heads, spans, PADDED_X, PADDED_X] float32 out, where SQUARES: sum x x^T, each token times its
        factor, backward times grad_norm too. Zeros where there are no tokens.
    REPEATS: heads of a group in x and y. GATES: tokens whose gates are summed at a time.
    """
    i_span = tl.program_id(0) % spans
    i_copy = (tl.program_id(0) // spans).to(tl.int64)
    i_head = i_copy % (groups * REPEATS)
    i_group = i_head // REPEATS
    i_chunk = i_copy // (groups * REPEATS)
    start, stop = chunk_bounds(p_chunks, i_chunk)
    first_block = i_span * blocks
    first = start + first_block * BLOCK
    o_x, o_y = tl.arange(0, PADDED_X), tl.arange(0, PADDED_Y)

    # Gates before these tokens; forward those of the whole chunk, too. The programs of a chunk each sum them anew.
    b_since = tl.zeros([1], tl.float64)
    b_all = tl.zeros([1], tl.float64)
    if GATED:
        for first_gate in range(start, tl.minimum(first, stop) if BACKWARD else stop, GATES):
            o_g, m_g = token_block(first_gate, stop, GATES)
            b_log_g = load_log_g(p_log_g, o_g, m_g, groups, i_group)
            b_all += tl.sum(b_log_g, 0)
            b_since += tl.sum(tl.where(o_g < first, b_log_g, 0.0), 0)
    b_total, b_total_rest = in_words(b_all)

    b_square = tl.zeros([PADDED_X, PADDED_X], tl.float32)
    stop_block = tl.minimum(first_block + blocks, token_blocks)
    if not COPY:  # Copies are written past the chunk's end, too.
        stop_block = tl.minimum(stop_block, tl.cdiv(stop - start, BLOCK).to(tl.int32))
    for i_block in range(first_block, stop_block):
        o_in_chunk = i_block * BLOCK + tl.arange(0, BLOCK)
        o_t, m_t = token_block(start + i_block * BLOCK, stop, BLOCK)
        o_query = o_t * (groups * REPEATS) + i_head
        b_factor = tl.full([BLOCK], 1.0, tl.float32)
        if GATED:
            b_log_g = load_log_g(p_log_g, o_t, m_t, groups, i_group)
            b_word, b_rest = in_words(b_since + tl.cumsum(b_log_g, 0))
            b_since += tl.sum(b_log_g, 0)
            p_words = p_log_g_cumsum + (o_t * groups + i_group) * 2
            m_words = o_t < tl.where(i_head % REPEATS == 0, stop, 0)  # The first of the group's heads writes.
            tl.store(p_words, b_word, mask=m_words)
            tl.store(p_words + 1, b_rest, mask=m_words)
            b_exponent = b_word if BACKWARD else (b_total - b_word) + (b_total_rest - b_rest)
            b_factor = tl.exp(tl.where(m_t, b_exponent, 0.0))
        b_key_factor = b_factor
        if COPY or QUOTIENT:
            b_y = load_columns(p_y + i_head * s_yh, s_yt, o_t, m_t, 0, DIM_Y, PADDED_Y)
        if QUOTIENT:
            # A query that sees nothing has output 0, whatever it is divided by, and so norm no gradient.
            b_out = load_columns(p_out + i_head * DIM_Y, groups * REPEATS * DIM_Y, o_t, m_t, 0, DIM_Y, PADDED_Y)
            b_norm = tl.load(p_norm + o_query, mask=m_t, other=1.0)
            b_inverse_norm = 1.0 / divisor(b_norm)
            b_dot = tl.sum(b_out.to(tl.float32) * b_y.to(tl.float32), 1)
            b_grad_norm = tl.where(tl.abs(b_norm) < SMALLEST, 0.0, -b_dot * b_inverse_norm)
            tl.store(p_grad_norm + o_query, b_grad_norm, mask=m_t)
            b_key_factor = b_factor * (power_scale * tl.where(m_t, b_grad_norm, 0.0))
            if DIVIDE:
                b_y = (b_y.to(tl.float32) * b_inverse_norm[:, None]).to(p_divided.dtype.element_ty)
                p_rows = p_divided + o_query * DIM_Y
                tl.store(p_rows[:, None] + o_y[None, :], b_y, mask=m_t[:, None] & (o_y < DIM_Y)[None, :])
            else:
                tl.store(p_inverse_norm + o_query, b_inverse_norm, mask=m_t)
        if COPY:
            if BACKWARD:
                b_factor *= power_scale
            if GATED or BACKWARD:
                b_y = (b_y.to(tl.float32) * b_factor[:, None]).to(p_y_copy.dtype.element_ty)
            p_rows = p_y_copy + (i_copy * (token_blocks * BLOCK) + o_in_chunk) * PADDED_Y
            tl.store(p_rows[:, None] + o_y[None, :], b_y)
        if COPY or SQUARES:
            b_x = load_columns(p_x + i_head * s_xh, s_xt, o_t, m_t, 0, DIM_X, PADDED_X)
        if COPY:
            p_rows = p_xt + (i_copy * PADDED_X + o_x) * (token_blocks * BLOCK)
            tl.store(p_rows[:, None] + o_in_chunk[None, :], tl.trans(b_x))
        if SQUARES:
            # [PADDED_X, BLOCK] @ [BLOCK, PADDED_X] -> [PADDED_X, PADDED_X]
            b_right = b_x.to(tl.float32) * b_key_factor[:, None]
            b_square = fine_product(tl.trans(b_x.to(OPERAND)), b_right, b_square, OPERAND, PRECISION)
    if SQUARES:
        p_rows = p_squares + (i_copy * spans + i_span) * (PADDED_X * PADDED_X) + o_x * PADDED_X
        tl.store(p_rows[:, None] + o_x[None, :], b_square)


class OutputGrad(NamedTuple):
    """What the backward pass starts from.

    grad: [tokens, H, V], the gradient of the output; features lie side by side
    out: [tokens, H, V], the output
    norm: [tokens, H], the sums of weights; no columns without a normaliser
    """

    grad: Tensor
    out: Tensor
    norm: Tensor


class Prepared(NamedTuple):
    """What `prepare` returns; sums of gates are where `Launches` has them.

    norm_grads: the gradients of the weighted sums and of norm; placeholders in a forward pass
    copies: where the kernels of hopper/ sum states, x with time last and y times its factor, both by chunks
    squares: where states are summed with a normaliser and p = 2, sums of x x^T, [slots, G, pieces, width, width]
    """

    norm_grads: NormGrads
    copies: tuple[Tensor, Tensor] | None
    squares: Tensor | None


class _Blocks(NamedTuple):
    """Tokens of a block, and how the kernel is compiled.

    registers: The most that a thread may have, where ptxas on its own takes so few that they spill; else None.
    """

    tokens: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any] | None:
        """Options of the compiler, as `launch` takes them."""
        return None if self.registers is None else most_registers(self.registers)


def _blocks(shape: LaunchShape, squares: bool) -> _Blocks:
    """Return the largest blocks that compile without spills."""
    width, dtype = shape.square_width, shape.dtype
    wide = max(width, shape.stored_columns) > 64
    if not squares:
        return _Blocks(BLOCK, 4, 2)
    if dtype == torch.bfloat16:
        return _Blocks(64 if width <= 64 else 32, 8 if wide else 4, 2, 168 if width <= 32 else None)
    if dtype == torch.float16:  # as tf32, in two products
        return _Blocks(32 if wide else 64, 8, 2)
    # Products of float32 run outside the matrix unit, and are unrolled over the block.
    return _Blocks(16, 8, 1, 128)


def prepare(calls: Launches, has_states: bool, output: OutputGrad | None = None) -> Prepared:
    """Prepare a forward pass over keys and values, or a backward one over queries and gradients.

    Args:
        calls: The call's tensors. Their log_g_cumsum is written here.
        has_states: Whether states follow.
        output: What the backward pass starts from.
    """
    shape, call = calls.shape, calls.shape.call
    squares = has_states and call.normalize and call.p == 2
    copy = has_states and shape.hopper and call.p > 1
    if output is None:
        return _prepare(calls, calls.k, calls.v, None, False, squares, copy)
    return _prepare(calls, calls.q, output.grad, output if call.normalize else None, True, squares, copy)


def make_copies(calls: Launches, x: Tensor, y: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """Return `Prepared.copies` of any x [tokens, heads, K] and y [tokens, heads, V], in a launch of their own."""
    copies = _prepare(calls, x, y, None, backward, False, True).copies
    assert copies is not None
    return copies


def _prepare(
    calls: Launches, x: Tensor, y: Tensor, output: OutputGrad | None, backward: bool, squares: bool, copy: bool
) -> Prepared:
    """Launch prepare_kernel where there is anything to do; output: where there is a quotient."""
    shape, call, absent = calls.shape, calls.shape.call, calls.placeholder
    heads = x.shape[1]
    quotient = output is not None
    divide = quotient and shape.hopper
    width = padded_dim(call.head_dim) if shape.hopper else shape.square_width
    own = _blocks(shape, squares)
    block = own.tokens
    chunk = -(-min(call.chunk_size, call.tokens) // BLOCK) * BLOCK
    span = max(SPAN if squares else SHORT_SPAN, block)
    spans = -(-chunk // span)
    xt = y_copy = divided = inverse_norm = grad_norm = absent
    if output is not None:
        grad_norm = torch.empty_like(output.norm)
        if divide:
            divided = torch.empty_like(output.out, dtype=x.dtype)
        else:
            inverse_norm = torch.empty_like(output.norm)
    if copy:
        xt = x.new_empty(shape.chunk_slots, heads, width, chunk)
        y_copy = x.new_empty(shape.chunk_slots, heads, chunk, shape.stored_columns)
    squares_size = (shape.chunk_slots, call.kv_heads, heads // call.kv_heads * spans, width, width)
    sums = calls.float(squares_size, squares)
    operand_type, precision, _ = operand(shape.dtype)
    arguments: dict[str, Any] = {
        "p_x": x,
        "p_y": y,
        "p_log_g": calls.log_g,
        "p_out": absent if output is None else output.out,
        "p_norm": absent if output is None else output.norm,
        "p_chunks": calls.chunk_table.chunks,
        "p_log_g_cumsum": calls.log_g_cumsum,
        "p_inverse_norm": inverse_norm,
        "p_grad_norm": grad_norm,
        "p_divided": divided,
        "p_xt": xt,
        "p_y_copy": y_copy,
        "p_squares": sums,
        "s_xt": x.stride(0),
        "s_xh": x.stride(1),
        "s_yt": y.stride(0),
        "s_yh": y.stride(1),
        "groups": call.kv_heads,
        "spans": spans,
        "blocks": span // block,
        "token_blocks": chunk // block,
        "power_scale": calls.power_scale,
        "DIM_X": call.head_dim,
        "DIM_Y": call.v_head_dim,
        "PADDED_X": width,
        "PADDED_Y": shape.stored_columns if copy else power_of_two(call.v_head_dim),
        "REPEATS": heads // call.kv_heads,
        "BLOCK": block,
        "GATES": min(power_of_two(call.chunk_size), 1024),
        "GATED": calls.gated,
        "BACKWARD": backward,
        "QUOTIENT": quotient,
        "DIVIDE": divide,
        "COPY": copy,
        "SQUARES": squares,
        "OPERAND": operand_type,
        "PRECISION": precision,
    }
    if calls.gated or quotient or copy or squares:
        programs = shape.chunk_slots * heads * spans
        launch(prepare_kernel, programs, arguments, own.warps, own.stages, own.options)
    norm_grads = NormGrads(inverse_norm, grad_norm, divided if divide else y)
    return Prepared(norm_grads, (xt, y_copy) if copy else None, sums if squares else None)
