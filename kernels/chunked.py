"""Power attention in chunks, in plain torch, for any device: attention within a chunk, a state between chunks.

The four stages of arXiv 2507.04239, Appendix F, in one loop over chunks, forward and backward. phi exists one block at
a time, in one buffer. All buffers of a call are made once, and all views of them, so that the forward pass takes no
more memory for a longer context. Training saves the state before some of the chunks, and recomputes those between on
the way back. The letters of shapes are those of call.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from powerplan.kernels.blocked_state import BlockedState
from powerplan.kernels.call import CallShape, Gradients, Inputs, Outputs
from powerplan.kernels.chunk import Workspace
from powerplan.kernels.state import divisor

CHUNKS_PER_SAVED_STATE = 8
"""Training saves the state before each eighth chunk, and the backward pass recomputes the seven that follow it.

At K = V = 64, p = 2 that is 293 bytes per token and key/value head with chunks of 256 tokens, less than q, k and v
take.
"""


def forward(
    inputs: Inputs, initial_state: Tensor | None, shape: CallShape, save_states: bool, return_state: bool
) -> Outputs:
    """Return the outputs of sequences of one length, with states in rows of the tiled phi.

    Args:
        inputs: The tensors of the call, not packed.
        initial_state: [B G, D, W], or None for an empty one.
        shape: Shape and settings of the call.
        save_states: Whether to save the state before every CHUNKS_PER_SAVED_STATE-th chunk for the backward pass, as
            [number, B G, D, W], each with its numbers in the order of BlockedState. An empty one is left out.
        return_state: Whether the final state, [B G, D, W], is wanted. If not, the last chunk is not added to it.
    """
    empty = _empty(inputs.q)
    out = inputs.v.new_empty(shape.batch, shape.tokens, shape.heads, shape.v_head_dim)
    norm = empty.new_empty(shape.batch, shape.tokens, shape.heads if shape.normalize else 0)
    state, workspace = BlockedState.of(shape, initial_state, empty), Workspace(shape, empty)
    chunks = shape.chunks()
    left_out = int(initial_state is None)
    number = -(-len(chunks) // CHUNKS_PER_SAVED_STATE) - left_out if save_states else 0
    saved_states = empty.new_empty(number, shape.state_count, shape.tiling.dim, shape.state_columns)
    for index, tokens in enumerate(chunks):
        if save_states and index % CHUNKS_PER_SAVED_STATE == 0 and state.filled:
            saved_states[index // CHUNKS_PER_SAVED_STATE - left_out].view(-1).copy_(state.flat)
        chunk = workspace.chunk(tokens)
        chunk.load(inputs, tokens)
        if state.filled:
            with record_function("power: query state"):
                chunk.query_state(state)
        with record_function("power: within chunk"):
            chunk.attend_within(add=state.filled)
        if return_state or index < len(chunks) - 1:
            with record_function("power: update state"):
                chunk.update_state(state)
        total = chunk.total
        if shape.normalize:
            weight_sums = total[:, -1:]
            chunk.split_heads(norm[:, tokens])[..., None].copy_(chunk.by_head(weight_sums))
            total[:, :-1].div_(divisor(weight_sums))
        chunk.split_heads(out[:, tokens]).copy_(chunk.by_head(total[:, : shape.v_head_dim]))
    return Outputs(out, norm, state.rows() if return_state else None, saved_states)


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    final_state_dot: Tensor | None,
    inputs: Inputs,
    outputs: Outputs,
    shape: CallShape,
    has_initial_state: bool,
) -> Gradients:
    """Return the gradients of the inputs and of the initial state, as [B G, D, W] in rows of the tiled phi.

    The gate's gradient needs no pass of its own: every weight is homogeneous of degree p in its query and in its key,
    so that dL/da_i = (q_i.dq_i - k_i.dk_i) / p, plus <dS, S> at the last token. dL/dlog_g is its reverse cumulative
    sum.

    Args:
        grad_out: [B, T, H, V], the gradient of the output.
        grad_state: [B G, D, W], that of the final state; None where there is none.
        final_state_dot: [B, G], <dS, S> of the final state S and its gradient; None where there is none.
        inputs: The tensors of the call, not packed.
        outputs: What `forward` returned; of its states only the saved ones are read.
        shape: Shape and settings of the call.
        has_initial_state: Whether the call had an initial state.
    """
    empty = _empty(inputs.q)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (inputs.q, inputs.k, inputs.v))
    grad_log_g_cumsum = None
    if inputs.log_g is not None:
        grad_log_g_cumsum = empty.new_empty(shape.batch, shape.tokens, shape.kv_heads)
    running_grad, workspace = BlockedState.of(shape, grad_state, empty), Workspace(shape, empty)
    for tokens, state in _states_backwards(inputs, outputs.saved_states, workspace, has_initial_state):
        chunk, grads = workspace.chunk(tokens), workspace.gradients(tokens)
        chunk.load(inputs, tokens)
        grads.load(grad_out[:, tokens], outputs.out[:, tokens], outputs.norm[:, tokens])
        with record_function("power: within chunk, backward"):
            grads.attend_within()
        if running_grad.filled:
            with record_function("power: update state, backward"):
                grads.update_state(running_grad)
        running_grad.decay(chunk.decay_over_chunk())
        if state.filled:
            with record_function("power: query state, backward"):
                grads.query_state(state, running_grad)
        if grad_log_g_cumsum is not None:
            grad_log_g_cumsum[:, tokens] = grads.grad_log_g_cumsum()
        chunk.split_heads(grad_q[:, tokens]).copy_(chunk.by_head(grads.q.mul_(shape.scale)[:, : shape.head_dim]))
        grad_k[:, tokens] = chunk.by_kv_head(grads.k[:, : shape.head_dim])
        grad_v[:, tokens] = chunk.by_kv_head(grads.v[:, : shape.v_head_dim])
    if grad_log_g_cumsum is not None and final_state_dot is not None:
        grad_log_g_cumsum[:, -1] += final_state_dot
    grad_log_g = None if grad_log_g_cumsum is None else grad_log_g_cumsum.flip(1).cumsum(1).flip(1)
    return Gradients(grad_q, grad_k, grad_v, grad_log_g, running_grad.rows() if has_initial_state else None)


def state(inputs: Inputs, shape: CallShape) -> Tensor:
    """Return the final state alone, [B G, D, W] in rows of the tiled phi, of sequences that start empty.

    Args:
        inputs: The tensors of the call, not packed; q is not read.
        shape: Shape and settings of the call, with as many query heads as key/value heads.
    """
    empty = _empty(inputs.k)
    state, workspace = BlockedState.of(shape, None, empty), Workspace(shape, empty)
    for tokens in shape.chunks():
        chunk = workspace.chunk(tokens)
        chunk.load(inputs, tokens, with_queries=False)
        with record_function("power: update state"):
            chunk.update_state(state)
    return state.rows()


def state_backward(grad_state: Tensor, inputs: Inputs, shape: CallShape) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of k and of v for that of `state`, and k.dk / p of every token, [B, T, G].

    Args:
        grad_state: [B G, D, W], the gradient of the state.
        inputs: As `state` took them.
        shape: As `state` took it.
    """
    empty = _empty(inputs.k)
    grad_k, grad_v = (x.new_empty(x.shape) for x in (inputs.k, inputs.v))
    k_dot_dk = empty.new_empty(shape.batch, shape.tokens, shape.kv_heads)
    running_grad, workspace = BlockedState.of(shape, grad_state, empty), Workspace(shape, empty)
    for tokens in reversed(shape.chunks()):
        chunk, grads = workspace.chunk(tokens), workspace.gradients(tokens)
        chunk.load(inputs, tokens, with_queries=False)
        for grad in (grads.q, grads.k, grads.v):
            grad.zero_()
        with record_function("power: update state, backward"):
            grads.update_state(running_grad)
        running_grad.decay(chunk.decay_over_chunk())
        k_dot_dk[:, tokens] = -grads.grad_log_g_cumsum()
        grad_k[:, tokens] = chunk.by_kv_head(grads.k[:, : shape.head_dim])
        grad_v[:, tokens] = chunk.by_kv_head(grads.v[:, : shape.v_head_dim])
    return grad_k, grad_v, k_dot_dk


def _states_backwards(
    inputs: Inputs, saved_states: Tensor, workspace: Workspace, has_initial_state: bool
) -> Iterator[tuple[slice, BlockedState]]:
    """Yield the chunks from the last to the first, each with the state before it, recomputed between those saved."""
    shape = workspace.shape
    chunks = shape.chunks()
    for segment in reversed(range(-(-len(chunks) // CHUNKS_PER_SAVED_STATE))):
        own_chunks = chunks[segment * CHUNKS_PER_SAVED_STATE : (segment + 1) * CHUNKS_PER_SAVED_STATE]
        if segment == 0 and not has_initial_state:
            states = [BlockedState.of(shape, None, workspace.like)]
        else:
            states = [BlockedState(shape, saved_states[segment - int(not has_initial_state)])]
        for tokens in own_chunks[:-1]:
            chunk = workspace.chunk(tokens)
            chunk.load(inputs, tokens, with_queries=False)
            state = states[-1].copy()
            with record_function("power: update state, again"):
                chunk.update_state(state)
            states.append(state)
        while states:
            yield own_chunks[len(states) - 1], states.pop()


def _empty(x: Tensor) -> Tensor:
    """Return an empty tensor of the dtype that the arithmetic is done in: float32, or float64 for float64 inputs."""
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
