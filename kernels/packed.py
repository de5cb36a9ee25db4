"""The torch engine over a batch, or over packed sequences one after another; states in the layout of PowerState."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from powerplan.kernels import chunked
from powerplan.kernels.call import LOWEST_LOG_GATE, CallShape, Gradients, Inputs, Outputs
from powerplan.kernels.conversion import Conversion
from powerplan.kernels.tiles import tile_conversion


def saved_states_size(
    shape: CallShape, sequences: int, packed: bool, has_initial_state: bool
) -> tuple[int, int, int, int]:
    """Return the size of the saved states, [number, B G, D, W]; enough for packed sequences of any lengths."""
    tokens_per_state = shape.chunk_size * chunked.CHUNKS_PER_SAVED_STATE
    if packed:
        number = shape.tokens // tokens_per_state + (sequences if has_initial_state else 0)
    else:
        number = (shape.tokens + tokens_per_state - 1) // tokens_per_state - int(not has_initial_state)
    return number, shape.state_count, shape.tiling.dim, shape.state_columns


def forward(
    inputs: Inputs, initial_state: Tensor | None, shape: CallShape, save_states: bool, return_state: bool
) -> Outputs:
    """Return the outputs of a call; its states are [N, G, D, W] in the layout of PowerState.

    Args:
        inputs: The tensors of the call.
        initial_state: [N, G, D, W], or None for an empty one.
        shape: Shape and settings of the call.
        save_states: Whether to save states for the backward pass, of `saved_states_size`.
        return_state: Whether the final state is wanted.
    """
    inputs = inputs.with_finite_gates()
    convert = _conversion(shape, inputs.q.device)
    rows = None if initial_state is None else convert.to_rows(initial_state.flatten(0, 1))
    if inputs.cu_seqlens is None:
        outputs = chunked.forward(inputs, rows, shape, save_states, return_state)
        return outputs._replace(final_state=_shared(outputs.final_state, convert, shape))
    each = []
    for index, tokens in enumerate(_tokens_of_each(inputs.cu_seqlens)):
        own_shape = replace(shape, tokens=tokens.stop - tokens.start)
        own_rows = None if rows is None else rows[_states_of(index, shape)]
        each.append(chunked.forward(inputs.at(tokens), own_rows, own_shape, save_states, return_state))
    final_rows = torch.cat([own.final_state for own in each if own.final_state is not None]) if return_state else None
    saved_states = each[0].saved_states
    if save_states:
        used = torch.cat([own.saved_states for own in each])
        saved_states = used.new_zeros(saved_states_size(shape, len(each), True, initial_state is not None))
        saved_states[: len(used)] = used
    out, norm = torch.cat([own.out for own in each], 1), torch.cat([own.norm for own in each], 1)
    return Outputs(out, norm, _shared(final_rows, convert, shape), saved_states)


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    inputs: Inputs,
    outputs: Outputs,
    shape: CallShape,
    has_initial_state: bool,
) -> Gradients:
    """Return the gradients of the inputs and of the initial state, [N, G, D, W].

    Args:
        grad_out: [B, T, H, V], the gradient of the output.
        grad_state: [N, G, D, W], that of the final state; None where there is none.
        inputs: The tensors of the call.
        outputs: What `forward` returned.
        shape: Shape and settings of the call.
        has_initial_state: Whether the call had an initial state.
    """
    grads = _backward(grad_out, grad_state, inputs.with_finite_gates(), outputs, shape, has_initial_state)
    if inputs.log_g is None or grads.log_g is None:
        return grads
    # Gates that count as LOWEST_LOG_GATE, whatever they are, have no gradient.
    log_g = grads.log_g.masked_fill_(inputs.log_g < LOWEST_LOG_GATE, 0.0).to(inputs.log_g.dtype)
    return grads._replace(log_g=log_g)


def state(inputs: Inputs, shape: CallShape) -> Tensor:
    """Return the final states alone, [N, G, D, W] in the layout of PowerState, of sequences that start empty.

    Args:
        inputs: The tensors of the call, with finite gates; q is not read.
        shape: Shape and settings of the call, with as many query heads as key/value heads.
    """
    rows = [chunked.state(*one) for one in _one_by_one(inputs, shape)]
    return _by_sequence(_conversion(shape, inputs.k.device).from_rows(torch.cat(rows)), shape)


def state_backward(grad_state: Tensor, inputs: Inputs, shape: CallShape) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of k and of v for that of `state`, [N, G, D, W], and k.dk / p of every token, [B, T, G]."""
    rows = _conversion(shape, inputs.k.device).from_rows_adjoint(grad_state.flatten(0, 1))
    if inputs.cu_seqlens is None:
        return chunked.state_backward(rows, inputs, shape)
    each = enumerate(_one_by_one(inputs, shape))
    parts = [chunked.state_backward(rows[_states_of(index, shape)], *one) for index, one in each]
    grad_k, grad_v, k_dot_dk = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return grad_k, grad_v, k_dot_dk


def _one_by_one(inputs: Inputs, shape: CallShape) -> list[tuple[Inputs, CallShape]]:
    """Return each packed sequence with its own shape, or the whole where nothing is packed."""
    if inputs.cu_seqlens is None:
        return [(inputs, shape)]
    spans = _tokens_of_each(inputs.cu_seqlens)
    return [(inputs.at(tokens), replace(shape, tokens=tokens.stop - tokens.start)) for tokens in spans]


def _backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    inputs: Inputs,
    outputs: Outputs,
    shape: CallShape,
    has_initial_state: bool,
) -> Gradients:
    convert = _conversion(shape, inputs.q.device)
    grad_rows = None if grad_state is None else convert.from_rows_adjoint(grad_state.flatten(0, 1))
    final_state_dot = None
    if grad_state is not None and outputs.final_state is not None:
        final_state_dot = (grad_state * outputs.final_state).sum((2, 3))
    if inputs.cu_seqlens is None:
        grads = chunked.backward(grad_out, grad_rows, final_state_dot, inputs, outputs, shape, has_initial_state)
        return grads._replace(initial_state=_shared_adjoint(grads.initial_state, convert, shape))
    each, used = [], 0
    for index, tokens in enumerate(_tokens_of_each(inputs.cu_seqlens)):
        own_shape = replace(shape, tokens=tokens.stop - tokens.start)
        number = saved_states_size(own_shape, 1, False, has_initial_state)[0]
        own_outputs = Outputs(
            outputs.out[:, tokens], outputs.norm[:, tokens], None, outputs.saved_states[used : used + number]
        )
        own_rows = None if grad_rows is None else grad_rows[_states_of(index, shape)]
        own_dot = None if final_state_dot is None else final_state_dot[index : index + 1]
        each.append(
            chunked.backward(
                grad_out[:, tokens], own_rows, own_dot, inputs.at(tokens), own_outputs, own_shape, has_initial_state
            )
        )
        used += number
    q, k, v = (torch.cat(parts, 1) for parts in zip(*(own[:3] for own in each), strict=True))
    log_g = None
    if inputs.log_g is not None:
        log_g = torch.cat([own.log_g for own in each if own.log_g is not None], 1)
    first_rows = None
    if has_initial_state:
        first_rows = torch.cat([own.initial_state for own in each if own.initial_state is not None])
    return Gradients(q, k, v, log_g, _shared_adjoint(first_rows, convert, shape))


def _conversion(shape: CallShape, device: torch.device) -> Conversion:
    return tile_conversion(shape.head_dim, shape.p, shape.tile, shape.padded_head_dim, device)


def _shared(rows: Tensor | None, convert: Conversion, shape: CallShape) -> Tensor | None:
    """Return states in rows of the tiled phi, [N G, D, W], in the layout of PowerState, [N, G, D, W]."""
    return None if rows is None else _by_sequence(convert.from_rows(rows), shape)


def _shared_adjoint(grad_rows: Tensor | None, convert: Conversion, shape: CallShape) -> Tensor | None:
    """Return the gradient of initial states, [N, G, D, W], from that of their rows, [N G, D, W]."""
    return None if grad_rows is None else _by_sequence(convert.to_rows_adjoint(grad_rows), shape)


def _by_sequence(x: Tensor, shape: CallShape) -> Tensor:
    return x.view(-1, shape.kv_heads, *x.shape[1:])


def _tokens_of_each(cu_seqlens: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]


def _states_of(index: int, shape: CallShape) -> slice:
    """Return the rows of one packed sequence in a tensor of N G states."""
    return slice(index * shape.kv_heads, (index + 1) * shape.kv_heads)
