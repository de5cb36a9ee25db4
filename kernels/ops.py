"""The chunked implementations as operators of torch.library: fake tensors, autograd, FLOP formulas.

States go in and out in the layout of PowerState; inside, each engine has its own. Two engines stand behind one pair of
operators (engines.py). Calls in eager mode do without the operators (eager.py).

The schema of an operator is flat. `ForwardArguments` and `BackwardArguments` name its places once; `_shape` makes the
CallShape that everything inside takes. What nobody wants is an empty tensor, since an operator cannot return None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powerplan.dims import chunked_power_flops, spow_dim
from powerplan.kernels import engines, packed
from powerplan.kernels.call import CallShape, Gradients, Inputs, Outputs

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class ForwardArguments(NamedTuple):
    """Arguments of `chunked_power`, in the order of its schema. A FLOP formula has sizes in place of tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_g: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    p: int
    scale: float
    chunk_size: int
    normalize: bool
    save_states: bool
    return_state: bool
    engine: str

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.q, self.k, self.v, self.log_g, self.cu_seqlens)


class BackwardArguments(NamedTuple):
    """Arguments of `chunked_power_backward`, in the order of its schema. A FLOP formula has sizes in place of
    tensors."""

    grad_out: Tensor
    grad_state: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    log_g: Tensor | None
    cu_seqlens: Tensor | None
    out: Tensor
    norm: Tensor
    final_state: Tensor
    saved_states: Tensor
    saved_keys: Tensor
    scales: Tensor
    p: int
    scale: float
    chunk_size: int
    normalize: bool
    has_initial_state: bool
    engine: str

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.q, self.k, self.v, self.log_g, self.cu_seqlens)

    @property
    def outputs(self) -> Outputs:
        final_state, scales = (x if x.numel() else None for x in (self.final_state, self.scales))
        return Outputs(self.out, self.norm, final_state, self.saved_states, self.saved_keys, scales)


def _shape(arguments: ForwardArguments | BackwardArguments) -> CallShape:
    """Return the shape and the settings of a call, from tensors or, in a FLOP formula, from their sizes."""
    given: tuple[Any, ...] = (arguments.q, arguments.k, arguments.v)
    q, k, v = (getattr(x, "shape", x) for x in given)
    return CallShape.of(q, k, v, arguments.p, arguments.scale, arguments.chunk_size, arguments.normalize)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# The types are written out: before torch 2.7, schemas are made from annotations in torch's own names.
@torch.library.custom_op("powerplan::chunked_power", mutates_args=())
def chunked_power(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    p: int,
    scale: float,
    chunk_size: int,
    normalize: bool,
    save_states: bool,
    return_state: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chunked power attention.

    Args:
        q: [B, T, H, K].
        k: [B, T, G, K].
        v: [B, T, G, V].
        log_g: [B, T, G], or None without gates.
        initial_state: [N, G, D, W], or None for an empty one.
        cu_seqlens: [N + 1], or None where each row of the batch is a sequence.
        p: Degree, 1 to 4.
        scale: Factor on q.k.
        chunk_size: Tokens per chunk.
        normalize: Whether sums are divided by the sum of their weights.
        save_states: Whether states are saved for the backward pass.
        return_state: Whether the final state is wanted.
        engine: "torch" or "triton".

    Returns:
        out [B, T, H, V]; the final state [N, G, D, W], the normaliser its last column; for the backward pass the sums
        of weights [B, T, H], the saved states with their keys, in the engine's own layout, and their scales [N, G, 3].
    """
    settings = (p, scale, chunk_size, normalize, save_states, return_state, engine)
    arguments = ForwardArguments(q, k, v, log_g, initial_state, cu_seqlens, *settings)
    shape = _shape(arguments)
    outputs = engines.forward(engine, arguments.inputs, initial_state, shape, save_states, return_state)
    out, norm, final_state, states, keys, scales = outputs
    # Outputs may not share memory: each that nobody wants is an empty tensor of its own.
    high = torch.promote_types(q.dtype, torch.float32)
    return (
        out,
        q.new_empty(0, dtype=high) if final_state is None else final_state,
        norm,
        states if save_states else states.new_empty(0),
        keys if save_states and normalize and keys is not None else q.new_empty(0, dtype=high),
        q.new_empty(0, dtype=high) if scales is None or not save_states else scales,
    )


@chunked_power.register_fake
def _(*flat: Any) -> Six:
    arguments = ForwardArguments(*flat)
    inputs, shape = arguments.inputs, _shape(arguments)
    sequences, has_initial_state = inputs.sequences, arguments.initial_state is not None
    high = inputs.q.new_empty(0, dtype=torch.promote_types(inputs.q.dtype, torch.float32))
    states, keys, scales = high.new_empty(0), high.new_empty(0), high.new_empty(0)
    if arguments.engine == "torch":
        if arguments.save_states:
            is_packed = inputs.cu_seqlens is not None
            states = high.new_empty(packed.saved_states_size(shape, sequences, is_packed, has_initial_state))
    else:
        from powerplan.kernels.triton.shapes import LaunchShape, saved_states

        launched, ends = LaunchShape.of(shape, inputs), (has_initial_state, arguments.return_state)
        states, saved_keys = saved_states(launched, arguments.save_states, *ends, inputs.q)
        keys = saved_keys if arguments.save_states and shape.normalize else keys
        if launched.needs_scales and arguments.save_states:
            scales = high.new_empty(sequences, shape.kv_heads, 3)
    final_size = (sequences, shape.kv_heads, spow_dim(shape.head_dim, shape.p), shape.state_columns)
    return (
        inputs.v.new_empty(shape.batch, shape.tokens, shape.heads, shape.v_head_dim),
        high.new_empty(final_size if arguments.return_state else (0,)),
        high.new_empty(shape.batch, shape.tokens, shape.heads if shape.normalize else 0),
        states,
        keys,
        scales,
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
    final_state: Tensor,
    saved_states: Tensor,
    saved_keys: Tensor,
    scales: Tensor,
    p: int,
    scale: float,
    chunk_size: int,
    normalize: bool,
    has_initial_state: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of chunked power attention.

    Args:
        grad_out: [B, T, H, V], the gradient of the output.
        grad_state: [N, G, D, W], that of the final state; None where there is none.
        q, k, v, log_g, cu_seqlens, p, scale, chunk_size, normalize, engine: as `chunked_power` took them.
        out, norm, final_state, saved_states, saved_keys, scales: what it returned.
        has_initial_state: Whether it had an initial state.

    Returns:
        The gradients of q, k, v, log_g and the initial state; empty for what there was not.
    """
    saved = (out, norm, final_state, saved_states, saved_keys, scales)
    tensors = (grad_out, grad_state, q, k, v, log_g, cu_seqlens, *saved)
    settings = (p, scale, chunk_size, normalize, has_initial_state, engine)
    arguments = BackwardArguments(*tensors, *settings)
    inputs, outputs, shape = arguments.inputs, arguments.outputs, _shape(arguments)
    grads = engines.backward(engine, grad_out, grad_state, inputs, outputs, shape, has_initial_state)
    return (
        grads.q,
        grads.k,
        grads.v,
        q.new_empty(0) if grads.log_g is None else grads.log_g,
        norm.new_empty(0) if grads.initial_state is None else grads.initial_state,
    )


@chunked_power_backward.register_fake
def _(*flat: Any) -> Five:
    arguments = BackwardArguments(*flat)
    inputs, norm, shape = arguments.inputs, arguments.norm, _shape(arguments)
    state_size = (inputs.sequences, shape.kv_heads, spow_dim(shape.head_dim, shape.p), shape.state_columns)
    return (
        _contiguous_like(inputs.q),
        _contiguous_like(inputs.k),
        _contiguous_like(inputs.v),
        inputs.q.new_empty(0) if inputs.log_g is None else _contiguous_like(inputs.log_g),
        norm.new_empty(state_size if arguments.has_initial_state else (0,)),
    )


NO_SECOND_DERIVATIVE = (
    "the chunked implementations of power_attention have no second derivatives (those of their gradients): "
    "use impl='reference' or impl='recurrent'"
)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


chunked_power_backward.register_autograd(_refuse_second_derivative)


def refuse_batch(*grads: Tensor | None) -> None:
    """Raise where autograd hands over several gradients of one output at a time, in a tensor of one."""
    if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in grads):
        raise RuntimeError(
            "the chunked implementations of power_attention take one gradient of their output at a time, without "
            "is_grads_batched=True (vectorize=True of torch.autograd.functional): use impl='reference' or "
            "impl='recurrent'"
        )


def backward_operator(
    engine: str,
    grad_out: Tensor,
    grad_state: Tensor | None,
    inputs: Inputs,
    outputs: Outputs,
    shape: CallShape,
    has_initial_state: bool,
) -> Gradients:
    """Do what engines.backward does, by the operator `chunked_power_backward`."""
    nobody_wants = outputs.norm.new_empty(0)
    saved = [nobody_wants if x is None else x for x in outputs]
    settings = (shape.p, shape.scale, shape.chunk_size, shape.normalize, has_initial_state, engine)
    arguments: tuple[Any, ...] = (grad_out, grad_state, *inputs, *saved, *settings)
    q, k, v, log_g, initial_state = chunked_power_backward(*arguments)
    gated = inputs.log_g is not None
    return Gradients(q, k, v, log_g if gated else None, initial_state if has_initial_state else None)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Six) -> None:
    arguments = ForwardArguments(*inputs)
    ctx.settings = arguments[6:]  # from p on
    ctx.has_initial_state = arguments.initial_state is not None
    out, final_state, norm, *own = output
    ctx.mark_non_differentiable(norm, *own)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arguments.inputs, out, norm, final_state, *own)


def _backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, *_unused: Any) -> tuple[Any, ...]:
    if not torch.compiler.is_compiling():
        refuse_batch(grad_out, grad_state)
    saved = ctx.saved_tensors
    inputs, outputs = Inputs(*saved[:5]), Outputs(*saved[5:])
    p, scale, chunk_size, normalize, save_states, return_state, engine = ctx.settings
    assert save_states, "the forward pass was run without what its gradient needs"
    grad_out = torch.zeros_like(outputs.out) if grad_out is None else grad_out
    shape = CallShape.of(inputs.q.shape, inputs.k.shape, inputs.v.shape, p, scale, chunk_size, normalize)
    grad_state = grad_state if return_state else None
    grads = backward_operator(engine, grad_out, grad_state, inputs, outputs, shape, ctx.has_initial_state)
    not_differentiable = (None,) * (len(ForwardArguments._fields) - 5)
    return grads.q, grads.k, grads.v, grads.log_g, grads.initial_state, *not_differentiable


chunked_power.register_autograd(_backward, setup_context=_setup)


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
    """One token of decoding in Triton, without gradients.

    Args:
        q: [N, H, K].
        k: [N, G, K].
        v: [N, G, V].
        log_g: [N, G], or None without gates.
        kv: [N, G, D, V], the state's sums of phi(k) v^T.
        key: [N, G, D], its sums of phi(k); empty without a normaliser.
        p: Degree, 1 to 4.
        scale: Factor on q.k.

    Returns:
        out [N, H, V], and the new kv and key.
    """
    return engines.step(q, k, v, log_g, kv, key, p, scale)


@power_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_g: Any, kv: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(*q.shape[:2], v.shape[2]), kv.new_empty(kv.shape), key.new_empty(key.shape)


@register_flop_formula(torch.ops.powerplan.chunked_power)
def _forward_flops(*flat: Any, **_: Any) -> int:
    """As of one sequence per row: sizes do not tell where packed ones begin, so that these count a little too much."""
    arguments = ForwardArguments(*flat)
    return _flops(_shape(arguments), arguments.initial_state is not None, arguments.return_state)


@register_flop_formula(torch.ops.powerplan.chunked_power_backward)
def _backward_flops(*flat: Any, **_: Any) -> int:
    """Twice the forward pass, as for every product; what is recomputed is not counted.

    Without a gradient of the final state nothing comes back through its last chunk, even where the state was wanted.
    """
    arguments = BackwardArguments(*flat)
    return 2 * _flops(_shape(arguments), arguments.has_initial_state, arguments.grad_state is not None)


@register_flop_formula(torch.ops.powerplan.power_step)
def _step_flops(q: Any, k: Any, v: Any, log_g: Any, kv: Any, key: Any, *_: Any, **__: Any) -> int:
    """2 D (V + z) for each query head that queries a state, and for each key/value head that updates one."""
    count, kv_heads, dim, v_head_dim = kv
    columns = v_head_dim + int(bool(key[-1]))
    return int(2 * count * dim * columns * (q[1] + kv_heads))


def _flops(shape: CallShape, has_initial_state: bool, return_state: bool) -> int:
    """Return the matmul FLOPs of a forward pass over all rows of the batch."""
    per_row = chunked_power_flops(
        shape.tokens,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.v_head_dim,
        p=shape.p,
        tile=shape.tile,
        chunk_size=shape.chunk_size,
        normalize=shape.normalize,
        has_initial_state=has_initial_state,
        return_state=return_state,
    )
    return int(shape.batch) * per_row
