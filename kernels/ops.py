"""The chunked implementation as torch.library operators: fake tensors, autograd, FLOP formula.

States go in and out in the shared layout of PowerState, and are tiled inside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powerplan.dims import chunked_power_flops, spow_dim
from powerplan.kernels import chunked
from powerplan.kernels.chunked import Plan
from powerplan.kernels.tiles import from_tiles, from_tiles_adjoint, to_tiles, to_tiles_adjoint

# out [B, T, H, V]; final state [B, G, D, W], the normaliser its last column; for the backward pass: sums of weights
# [B, T, H], final state and states to restart from, tiled. States that nobody wants are empty tensors.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def plan_of(q: Tensor, k: Tensor, v: Tensor, p: int, scale: float, chunk: int, normalize: bool) -> Plan:
    """Return the plan of q [B, T, H, K], k [B, T, G, K], v [B, T, G, V]."""
    batch, tokens, groups, key_dim = k.shape
    return Plan(p, scale, chunk, normalize, batch, tokens, groups, q.shape[2] // groups, key_dim, v.shape[3])


def _layout(plan: Plan) -> tuple[int, int, int, int]:
    return plan.key_dim, plan.p, plan.tile, plan.d


@torch.library.custom_op("powerplan::chunked_power", mutates_args=())
def chunked_power(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    keep: bool,
    want_state: bool,
) -> Outputs:
    """Chunked power attention. q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log_g [B, T, G], state [B, G, D, W]."""
    plan = plan_of(q, k, v, p, scale, chunk, normalize)
    # Inside an operator autocast would still turn products to bf16, and the state is fp32.
    with torch.autocast(q.device.type, enabled=False):
        tiled = None if state is None else to_tiles(state.flatten(0, 1), *_layout(plan))
        out, norm, final, kept = chunked.forward(q, k, v, log_g, tiled, plan, keep, want_state)
        if final is None:
            return out, norm.new_empty(0), norm, norm.new_empty(0), kept
        shared = from_tiles(final, *_layout(plan)).view(plan.batch, plan.groups, -1, plan.columns)
        return out, shared, norm, final if keep else norm.new_empty(0), kept


@chunked_power.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    keep: bool,
    want_state: bool,
) -> Outputs:
    # Head dims become constants of the graph, as phi's dimension does; batch and time may stay symbolic.
    plan = replace(plan_of(q, k, v, p, scale, chunk, normalize), key_dim=int(k.shape[3]))
    heads = plan.groups * plan.repeats
    work = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    tiled = (plan.batch * plan.groups, plan.layout.dim, plan.columns)
    pieces = 0
    if keep:
        chunks = (plan.tokens + chunk - 1) // chunk
        pieces = (chunks + chunked.EVERY - 1) // chunked.EVERY - int(state is None)
    shared = (plan.batch, plan.groups, spow_dim(plan.key_dim, p), plan.columns)
    return (
        v.new_empty(plan.batch, plan.tokens, heads, plan.value_dim),
        work.new_empty(shared if want_state else (0,)),
        work.new_empty(plan.batch, plan.tokens, heads if normalize else 0),
        work.new_empty(tiled if want_state and keep else (0,)),
        work.new_empty((pieces, *tiled)),
    )


@torch.library.custom_op("powerplan::chunked_power_backward", mutates_args=())
def chunked_power_backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    out: Tensor,
    norm: Tensor,
    final: Tensor,
    kept: Tensor,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_g and the initial state, for those of the output and the final state."""
    plan = plan_of(q, k, v, p, scale, chunk, normalize)
    with torch.autocast(q.device.type, enabled=False):
        tiled = None if grad_state is None else from_tiles_adjoint(grad_state.flatten(0, 1), *_layout(plan))
        grad_q, grad_k, grad_v, grad_g, grad = chunked.backward(
            grad_out, tiled, q, k, v, log_g, out, norm, kept, final if final.numel() else None, plan, with_state
        )
        gate = q.new_empty(0) if log_g is None or grad_g is None else grad_g.to(log_g.dtype)
        if not with_state:
            return grad_q, grad_k, grad_v, gate, norm.new_empty(0)
        shared = to_tiles_adjoint(grad, *_layout(plan)).view(plan.batch, plan.groups, -1, plan.columns)
        return grad_q, grad_k, grad_v, gate, shared


@chunked_power_backward.register_fake
def _(
    grad_out: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    out: Tensor,
    norm: Tensor,
    final: Tensor,
    kept: Tensor,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate = q.new_empty(0) if log_g is None else torch.empty_like(log_g, memory_format=torch.contiguous_format)
    shape = (k.shape[0], k.shape[2], spow_dim(int(k.shape[3]), p), v.shape[3] + int(normalize))
    state = kept.new_empty(shape if with_state else (0,))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), gate, state


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    q, k, v, log_g, state, *ctx.settings = inputs
    ctx.has_state = state is not None
    out, _, norm, final, kept = output
    ctx.mark_non_differentiable(norm, final, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_g, out, norm, final, kept)


def _backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, *_unused: Any) -> tuple[Any, ...]:
    q, k, v, log_g, out, norm, final, kept = ctx.saved_tensors
    p, scale, chunk, normalize, keep, want_state = ctx.settings
    assert keep, "the forward pass was run without what its gradient needs"
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_state = grad_state if want_state else None
    grad_q, grad_k, grad_v, gate, state = chunked_power_backward(
        grad_out, grad_state, q, k, v, log_g, out, norm, final, kept, p, scale, chunk, normalize, ctx.has_state
    )
    gates = None if log_g is None else gate
    return grad_q, grad_k, grad_v, gates, state if ctx.has_state else None, *(None,) * 6


chunked_power.register_autograd(_backward, setup_context=_setup)


def _flops(q: Any, k: Any, v: Any, with_state: bool, p: int, chunk: int, normalize: bool) -> int:
    batch, tokens, groups, key_dim = k
    per_row = chunked_power_flops(
        tokens,
        heads=q[2],
        kv_heads=groups,
        head_dim=key_dim,
        v_head_dim=v[3],
        p=p,
        tile=min(chunked.TILE, key_dim),
        chunk_size=chunk,
        normalize=normalize,
        with_state=with_state,
    )
    return int(batch) * per_row


@register_flop_formula(torch.ops.powerplan.chunked_power)
def _forward_flops(
    q: Any,
    k: Any,
    v: Any,
    log_g: Any,
    state: Any,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    *_: Any,
    **__: Any,
) -> int:
    return _flops(q, k, v, state is not None, p, chunk, normalize)


@register_flop_formula(torch.ops.powerplan.chunked_power_backward)
def _backward_flops(
    grad_out: Any,
    grad_state: Any,
    q: Any,
    k: Any,
    v: Any,
    log_g: Any,
    out: Any,
    norm: Any,
    final: Any,
    kept: Any,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    with_state: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Twice the forward's, as for every product; what is recomputed is not counted."""
    return 2 * _flops(q, k, v, with_state, p, chunk, normalize)
