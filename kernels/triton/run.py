"""The forward and backward pass over sequences that lie end to end, those of a batch included."""

from __future__ import annotations

import torch
from torch import Tensor

from powerplan.kernels.call import Gradients, Inputs, Outputs
from powerplan.kernels.triton.launches import Launches, StatePair
from powerplan.kernels.triton.layout import squares, step_conversion
from powerplan.kernels.triton.normaliser import key_rows
from powerplan.kernels.triton.prepare import OutputGrad, prepare
from powerplan.kernels.triton.shapes import LaunchShape, saved_states, tokens_first
from powerplan.kernels.triton.states import scan


def _to_rows(state: Tensor, shape: LaunchShape, adjoint: bool = False) -> StatePair:
    """[N, G, D, W] in the layout of PowerState -> states [N, G, rows, V] and their normalisers in the kernels'."""
    call = shape.call
    convert = step_conversion(call.head_dim, call.p, shape.phi_width, shape.scan_steps, state.device)
    flat = state.flatten(0, 1).float()
    apart = flat[..., :-1] if shape.key_apart else flat
    rows = convert.from_rows_adjoint(apart) if adjoint else convert.to_rows(apart)
    rows = rows.view(*state.shape[:2], *rows.shape[1:])
    if shape.key_apart:
        return rows.contiguous(), _to_key(state[..., -1].float(), shape, adjoint).contiguous()
    key = rows[..., -1] if call.normalize else rows[..., :1]
    return rows[..., : call.v_head_dim].contiguous(), key.contiguous()


def _to_key(key: Tensor, shape: LaunchShape, adjoint: bool) -> Tensor:
    """Return the last column of states, [N, G, D], as the kernels sum it where it is a state of its own."""
    call = shape.call
    if shape.lower is None:
        return squares(call.head_dim, shape.square_width, key.device).to_square(key)
    return key_rows(call.head_dim, call.p, shape.phi_width, key.device).to_rows(key, adjoint)


def _from_key(key: Tensor, shape: LaunchShape, adjoint: bool) -> Tensor:
    """Return [N, G, D] for what `_to_key` returned."""
    call = shape.call
    if shape.lower is None:
        return squares(call.head_dim, shape.square_width, key.device).from_square(key)
    return key_rows(call.head_dim, call.p, shape.phi_width, key.device).from_rows(key, adjoint)


def _from_rows(states: StatePair, shape: LaunchShape, adjoint: bool = False) -> Tensor:
    """States [N, G, rows, V] and their normalisers in the kernels' layout -> [N, G, D, W] in that of PowerState."""
    call, (kv, key) = shape.call, states
    convert = step_conversion(call.head_dim, call.p, shape.phi_width, shape.scan_steps, kv.device)
    joined = call.normalize and not shape.key_apart
    flat = (torch.cat((kv, key[..., None]), -1) if joined else kv).flatten(0, 1)
    rows = convert.to_rows_adjoint(flat) if adjoint else convert.from_rows(flat)
    state = rows.view(*kv.shape[:2], *rows.shape[1:])
    if shape.key_apart:
        return torch.cat((state, _from_key(key, shape, adjoint)[..., None]), -1)
    return state


def launches(shape: LaunchShape, inputs: Inputs) -> Launches:
    """Return the kernels over a call's tensors."""
    if not shape.hopper:
        return Launches(shape, inputs)
    from powerplan.kernels.triton.hopper.run import HopperLaunches

    return HopperLaunches(shape, inputs)


def forward(inputs: Inputs, initial_state: Tensor | None, shape: LaunchShape, return_state: bool) -> Outputs:
    """Return the outputs of a call, with the states before all chunks as its saved ones.

    Args:
        inputs: The tensors of the call.
        initial_state: [N, G, D, W] in the layout of PowerState, or None for an empty one.
        shape: Shape and settings of the call, and what the kernels need beside them.
        return_state: Whether the final state is wanted.
    """
    if shape.needs_scales:  # This comes back here, with scaled operands.
        from powerplan.kernels.triton.hopper import float16

        return float16.forward(inputs, initial_state, shape, return_state)
    calls = launches(shape, inputs)
    start = None if initial_state is None else _to_rows(initial_state, shape)
    states, final_state = _no_states(calls), None
    has_states = shape.has_states(start is not None, return_state)
    prepared = prepare(calls, has_states)
    if has_states:
        states, end, _ = scan(calls, calls.k, calls.v, prepared, start, return_state)
        del prepared  # its copies are as large as k and v
        if return_state:
            final_state = _from_rows(end, shape)
    out, norm = calls.output(states, start is not None)
    rows = (shape.call.batch, shape.call.tokens)
    norm = norm.view(*rows, -1) if shape.call.normalize else norm.new_empty(*rows, 0)
    return Outputs(out.view(*rows, *out.shape[1:]), norm, final_state, *states)


def _no_states(calls: Launches) -> StatePair:
    """Return what stands for states that nobody reads."""
    shape, groups = calls.shape, calls.shape.call.kv_heads
    states = calls.q.new_empty(0, groups, shape.rows, shape.stored_columns, dtype=shape.state_dtype)
    return states, calls.q.new_empty((0, groups, *shape.key_size), dtype=shape.key_dtype)


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    inputs: Inputs,
    outputs: Outputs,
    shape: LaunchShape,
    has_initial_state: bool,
) -> Gradients:
    """Return the gradients of the inputs and of the initial state, [N, G, D, W].

    Args:
        grad_out: [B, T, H, V], the gradient of the output.
        grad_state: [N, G, D, W], that of the final state; None where there is none.
        inputs: The tensors of the call.
        outputs: What `forward` returned.
        shape: Shape and settings of the call, and what the kernels need beside them.
        has_initial_state: Whether the call had an initial state.
    """
    if shape.needs_scales:  # This comes back here, with scaled operands.
        from powerplan.kernels.triton.hopper import float16

        return float16.backward(grad_out, grad_state, inputs, outputs, shape, has_initial_state)
    calls = launches(shape, inputs)
    grad = tokens_first(grad_out)
    norm = outputs.norm.flatten(0, 1) if shape.call.normalize else outputs.norm
    end = None if grad_state is None else _to_rows(grad_state, shape, adjoint=True)
    has_states = shape.has_states(has_initial_state, end is not None)
    prepared = prepare(calls, has_states, OutputGrad(grad, outputs.out.flatten(0, 1), norm))
    norm_grads = prepared.norm_grads
    assert outputs.saved_keys is not None, "the forward pass of this engine saves keys, or a placeholder"
    states = (outputs.saved_states, outputs.saved_keys)
    grad_states, grad_initial_state = _no_states(calls), None
    if has_states:
        grad_states, grad_start, grad_gate_carry = scan(
            calls, calls.q, norm_grads.y, prepared, end, has_initial_state, states
        )
        del prepared
        if has_initial_state:
            grad_initial_state = _from_rows(grad_start, shape, adjoint=True)
    else:
        grad_gate_carry = calls.no_carry()
    dq, q_dot_dq = calls.grad_queries(grad, norm_grads, states, has_initial_state)
    dk, dv, k_dot_dk = calls.grad_keys(grad, norm_grads, grad_states, end is not None)
    grad_log_g = None
    if inputs.log_g is not None:
        if grad_state is not None and outputs.final_state is not None:
            final_state_dot = (grad_state * outputs.final_state).sum((2, 3))
            grad_gate_carry[:, :, 0].index_add_(0, calls.chunk_table.first_chunk[1:] - 1, final_state_dot)
        grad_log_g = calls.grad_log_g(q_dot_dq, k_dot_dk, grad_gate_carry).view(inputs.log_g.shape)
    dq, dk, dv = dq.view(inputs.q.shape), dk.view(inputs.k.shape), dv.view(inputs.v.shape)
    return Gradients(dq, dk, dv, grad_log_g, grad_initial_state)


def state(inputs: Inputs, shape: LaunchShape) -> Tensor:
    """Return the final states alone, [N, G, D, W] in the layout of PowerState, of sequences that start empty.

    Args:
        inputs: The tensors of the call. q is a tensor of k's size that is not read.
        shape: Shape and settings of the call, with as many query heads as key/value heads.
    """
    if shape.needs_scales:  # This comes back here, with scaled operands.
        from powerplan.kernels.triton.hopper import float16

        return float16.state(inputs, shape)
    calls = launches(shape, inputs)
    _, end, _ = scan(calls, calls.k, calls.v, prepare(calls, True), None, True)
    return _from_rows(end, shape)


def state_backward(grad_state: Tensor, inputs: Inputs, shape: LaunchShape) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of k and of v for that of `state`, [N, G, D, W]; with gates k.dk / p too, [B, T, G].

    These are the kernels of a whole backward pass, for queries of 0 whose outputs have gradients of 0.
    """
    if shape.needs_scales:  # This comes back here, with scaled operands.
        from powerplan.kernels.triton.hopper import float16

        return float16.state_backward(grad_state, inputs, shape)
    call = shape.call
    silent = inputs._replace(q=torch.zeros_like(inputs.k))
    calls = launches(shape, silent)
    grad = torch.zeros_like(calls.v, memory_format=torch.contiguous_format)
    norm = torch.zeros(grad.shape[:2] if call.normalize else (0,), dtype=torch.float32, device=calls.device)
    prepared = prepare(calls, True, OutputGrad(grad, grad, norm))
    norm_grads = prepared.norm_grads
    # <dS, S> of the chunks is not needed (engines.state_backward): any states of the right sizes do.
    unread = saved_states(shape, True, True, True, calls.k)
    end = _to_rows(grad_state, shape, adjoint=True)
    grad_states, _, _ = scan(calls, calls.q, norm_grads.y, prepared, end, False, unread)
    grad_k, grad_v, k_dot_dk = calls.grad_keys(grad, norm_grads, grad_states, True)
    shares = None if inputs.log_g is None else k_dot_dk.view(inputs.log_g.shape) / call.p
    return grad_k.view(inputs.k.shape), grad_v.view(inputs.v.shape), shares
