"""The state of tokens without queries as operators of torch.library: what ops.py is for whole calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powerplan.dims import spow_dim
from powerplan.kernels import engines
from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.ops import NO_SECOND_DERIVATIVE, refuse_batch


def _shape(k: Any, v: Any, p: int, chunk_size: int, normalize: bool) -> CallShape:
    """Return the shape of a call, from tensors or, in a FLOP formula, from their sizes. Queries stand for keys."""
    k, v = (getattr(x, "shape", x) for x in (k, v))
    return CallShape.of(k, k, v, p, 1.0, chunk_size, normalize)


@torch.library.custom_op("powerplan::power_state", mutates_args=())
def state_operator(
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    p: int,
    chunk_size: int,
    normalize: bool,
    engine: str,
) -> Tensor:
    """The state that tokens leave behind.

    Args:
        k: [B, T, G, K].
        v: [B, T, G, V].
        log_g: [B, T, G], or None without gates.
        cu_seqlens: [N + 1], or None where each row of the batch is a sequence.
        p: Degree, 1 to 4.
        chunk_size: Tokens per chunk.
        normalize: Whether the state has a normaliser, its last column.
        engine: "torch" or "triton".

    Returns:
        [N, G, D, W].
    """
    return engines.state(engine, Inputs(k, k, v, log_g, cu_seqlens), _shape(k, v, p, chunk_size, normalize))


@state_operator.register_fake
def _(k: Tensor, v: Tensor, log_g: Any, cu_seqlens: Any, p: int, chunk_size: int, normalize: bool, _: str) -> Tensor:
    sequences = Inputs(k, k, v, log_g, cu_seqlens).sequences
    size = (sequences, k.shape[2], spow_dim(int(k.shape[3]), p), v.shape[3] + int(normalize))
    return k.new_empty(size, dtype=torch.promote_types(k.dtype, torch.float32))


@torch.library.custom_op("powerplan::power_state_backward", mutates_args=())
def state_backward_operator(
    grad_state: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    p: int,
    chunk_size: int,
    normalize: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and log_g (empty without gates) for that of the state, [N, G, D, W]."""
    inputs, shape = Inputs(k, k, v, log_g, cu_seqlens), _shape(k, v, p, chunk_size, normalize)
    grad_k, grad_v, grad_log_g = engines.state_backward(engine, grad_state, inputs, shape)
    return grad_k, grad_v, k.new_empty(0) if grad_log_g is None else grad_log_g


@state_backward_operator.register_fake
def _(grad_state: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    grads = [x.new_empty(x.shape) for x in (k, v)]
    return grads[0], grads[1], k.new_empty(0) if log_g is None else log_g.new_empty(log_g.shape)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


state_backward_operator.register_autograd(_refuse_second_derivative)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _backward(ctx: Any, grad_state: Tensor) -> tuple[Any, ...]:
    if not torch.compiler.is_compiling():
        refuse_batch(grad_state)
    k, v, log_g, cu_seqlens = ctx.saved_tensors
    grads = state_backward_operator(grad_state, k, v, log_g, cu_seqlens, *ctx.settings)
    return grads[0], grads[1], None if log_g is None else grads[2], *[None] * 5


state_operator.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.powerplan.power_state)
def _flops(
    k: Any, v: Any, log_g: Any, cu_seqlens: Any, p: int, chunk_size: int, normalize: bool, *_: Any, **__: Any
) -> int:
    """2 D W for each token and key/value head, with D of the tiled embedding."""
    shape = _shape(k, v, p, chunk_size, normalize)
    return 2 * int(shape.batch * shape.tokens) * shape.kv_heads * shape.tiling.dim * shape.state_columns


@register_flop_formula(torch.ops.powerplan.power_state_backward)
def _backward_flops(grad_state: Any, *arguments: Any, **_: Any) -> int:
    return 2 * _flops(*arguments)
