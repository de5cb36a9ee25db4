"""The chunked implementations as torch.library operators: fake tensors, autograd, FLOP formula.

States go in and out in the shared layout of PowerState, and are laid out otherwise inside. Two engines stand behind one
pair of operators: "torch" (chunked.py) and "triton" (triton/run.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powerplan.dims import chunked_power_flops, spow_dim
from powerplan.kernels import packed
from powerplan.kernels.plan import TILE, Plan

# Outputs: out [B, T, H, V]; final state [N, G, D, W], the normaliser its last column; for the backward pass: sums of
# weights [B, T, H], and states to restart from with their keys, in the engine's own layout. What nobody wants is empty.
# Types are written out: before torch 2.7, schemas are made from annotations in torch's own names.


def plan_of(q: Tensor, k: Tensor, v: Tensor, p: int, scale: float, chunk: int, normalize: bool) -> Plan:
    """Return the plan of q [B, T, H, K], k [B, T, G, K], v [B, T, G, V]."""
    batch, tokens, groups, key_dim = k.shape
    return Plan(p, scale, chunk, normalize, batch, tokens, groups, q.shape[2] // groups, int(key_dim), int(v.shape[3]))


@contextmanager
def _inside(q: Tensor) -> Iterator[None]:
    """Autocast, which would still turn products inside an operator to bf16, is off; kernels start on q's device."""
    device = torch.cuda.device(q.device) if q.is_cuda else nullcontext()
    with torch.autocast(q.device.type, enabled=False), device:
        yield


def _sequences(k: Tensor, cu_seqlens: Tensor | None) -> int:
    return k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.custom_op("powerplan::chunked_power", mutates_args=())
def chunked_power(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    keep: bool,
    want_state: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chunked power attention. q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log_g [B, T, G], state [N, G, D, W]."""
    plan = plan_of(q, k, v, p, scale, chunk, normalize)
    with _inside(q):
        if engine == "torch":
            return packed.forward(q, k, v, log_g, state, cu_seqlens, plan, keep, want_state)
        from powerplan.kernels.triton import run
        from powerplan.kernels.triton.shapes import shapes_of

        shapes = shapes_of(plan, _sequences(k, cu_seqlens), q)
        out, final, norm, states, keys = run.forward(q, k, v, log_g, state, cu_seqlens, shapes, want_state)
    nothing = out.new_empty(0)
    return (
        out,
        nothing.float() if final is None else final,
        norm,
        states if keep else nothing.to(states.dtype),
        keys if keep and normalize else nothing.float(),
    )


@chunked_power.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    keep: bool,
    want_state: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Head dims become constants of the graph, as phi's dimension does; batch and time may stay symbolic.
    plan = plan_of(q, k, v, p, scale, chunk, normalize)
    sequences = _sequences(k, cu_seqlens)
    heads = plan.groups * plan.repeats
    work = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    shared = (sequences, plan.groups, spow_dim(plan.key_dim, p), plan.columns)
    states, keys = work.new_empty(0), work.new_empty(0)
    if engine == "torch":
        if keep:
            states = work.new_empty(packed.restarts(plan, sequences, cu_seqlens is not None, state is not None))
    else:
        from powerplan.kernels.triton.shapes import kept, shapes_of

        states, keys = kept(shapes_of(plan, sequences, q), keep, q)
    return (
        v.new_empty(plan.batch, plan.tokens, heads, plan.value_dim),
        work.new_empty(shared if want_state else (0,)),
        work.new_empty(plan.batch, plan.tokens, heads if normalize else 0),
        states,
        keys,
    )


@torch.library.custom_op("powerplan::chunked_power_backward", mutates_args=())
def chunked_power_backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    norm: Tensor,
    final: Tensor,
    states: Tensor,
    keys: Tensor,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    with_state: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_g and the initial state, for those of the output and the final state."""
    plan = plan_of(q, k, v, p, scale, chunk, normalize)
    end = final if final.numel() else None
    given = (grad_out, grad_state, q, k, v, log_g, cu_seqlens, out, norm)
    with _inside(q):
        if engine == "torch":
            grad_q, grad_k, grad_v, grad_g, grad = packed.backward(*given, states, end, plan, with_state)
        else:
            from powerplan.kernels.triton import run
            from powerplan.kernels.triton.shapes import shapes_of

            shapes = shapes_of(plan, _sequences(k, cu_seqlens), q)
            grad_q, grad_k, grad_v, grad_g, grad = run.backward(*given, states, keys, end, shapes, with_state)
    gate = q.new_empty(0) if log_g is None or grad_g is None else grad_g.to(log_g.dtype)
    return grad_q, grad_k, grad_v, gate, norm.new_empty(0) if grad is None else grad


@chunked_power_backward.register_fake
def _(
    grad_out: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    norm: Tensor,
    final: Tensor,
    states: Tensor,
    keys: Tensor,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    with_state: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate = q.new_empty(0) if log_g is None else torch.empty_like(log_g, memory_format=torch.contiguous_format)
    columns = int(v.shape[3]) + int(normalize)
    shape = (_sequences(k, cu_seqlens), k.shape[2], spow_dim(int(k.shape[3]), p), columns)
    state = norm.new_empty(shape if with_state else (0,))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, gate, state


@torch.library.custom_op("powerplan::power_step", mutates_args=())
def power_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    kv: Tensor,
    key: Tensor,
    p: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token in Triton: out [N, H, V], the new kv [N, G, D, V] and key [N, G, D] (empty without a normaliser)."""
    from powerplan.kernels.triton import decode

    with _inside(q):
        return decode.step(q, k, v, log_g, kv, key, p, scale)


@power_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    kv: Tensor,
    key: Tensor,
    p: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(*q.shape[:2], v.shape[2]), kv.new_empty(kv.shape), key.new_empty(key.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_g, state, cu_seqlens, *ctx.settings = inputs
    ctx.has_state = state is not None
    out, final, norm, states, keys = output
    ctx.mark_non_differentiable(norm, states, keys)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_g, cu_seqlens, out, norm, final, states, keys)


def _backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, *_unused: Any) -> tuple[Any, ...]:
    q, k, v, log_g, cu_seqlens, out, norm, final, states, keys = ctx.saved_tensors
    p, scale, chunk, normalize, keep, want_state, engine = ctx.settings
    assert keep, "the forward pass was run without what its gradient needs"
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_state = grad_state if want_state else None
    saved = (q, k, v, log_g, cu_seqlens, out, norm, final, states, keys)
    settings = (p, scale, chunk, normalize, ctx.has_state, engine)
    grad_q, grad_k, grad_v, gate, state = chunked_power_backward(grad_out, grad_state, *saved, *settings)
    gates = None if log_g is None else gate
    return grad_q, grad_k, grad_v, gates, state if ctx.has_state else None, *(None,) * 8


chunked_power.register_autograd(_backward, setup_context=_setup)


def _flops(q: Any, k: Any, v: Any, p: int, chunk: int, normalize: bool, with_state: bool, want_state: bool) -> int:
    batch, tokens, groups, key_dim = k
    per_row = chunked_power_flops(
        tokens,
        heads=q[2],
        kv_heads=groups,
        head_dim=key_dim,
        v_head_dim=v[3],
        p=p,
        tile=min(TILE, key_dim),
        chunk_size=chunk,
        normalize=normalize,
        with_state=with_state,
        want_state=want_state,
    )
    return int(batch) * per_row


@register_flop_formula(torch.ops.powerplan.chunked_power)
def _forward_flops(
    q: Any,
    k: Any,
    v: Any,
    log_g: Any,
    state: Any,
    cu_seqlens: Any,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    keep: bool,
    want_state: bool,
    *_: Any,
    **__: Any,
) -> int:
    """As of one sequence per row: where packed ones begin is not known from shapes, so they count a little too much."""
    return _flops(q, k, v, p, chunk, normalize, state is not None, want_state)


@register_flop_formula(torch.ops.powerplan.power_step)
def _step_flops(q: Any, k: Any, v: Any, log_g: Any, kv: Any, key: Any, *_: Any, **__: Any) -> int:
    """2 D (V + z) for each query head that asks, and for each key/value head that is updated."""
    count, groups, dim, value_dim = kv
    columns = value_dim + int(bool(key[-1]))
    return int(2 * count * dim * columns * (q[1] + groups))


@register_flop_formula(torch.ops.powerplan.chunked_power_backward)
def _backward_flops(
    grad_out: Any,
    grad_state: Any,
    q: Any,
    k: Any,
    v: Any,
    log_g: Any,
    cu_seqlens: Any,
    out: Any,
    norm: Any,
    final: Any,
    states: Any,
    keys: Any,
    p: int,
    scale: float,
    chunk: int,
    normalize: bool,
    with_state: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Twice the forward's, as for every product; what is recomputed is not counted.

    Without a gradient of the final state nothing comes back through its last chunk, even where the state was wanted.
    """
    return 2 * _flops(q, k, v, p, chunk, normalize, with_state, grad_state is not None)
