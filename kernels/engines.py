"""The two engines of the chunked implementation behind one pair of functions: "torch" (packed.py) and "triton".

The operators of torch.library (ops.py) and the calls that need none (eager.py) both come here.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from powerplan.kernels import packed
from powerplan.kernels.call import LOWEST_LOG_GATE, CallShape, Gradients, Inputs, Outputs

_NOTHING = nullcontext()


def inside(q: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off, which would still turn products inside a call to bf16; start kernels on q's device.

    Nothing is entered where nothing changes: torch.autocast alone takes 5 us a call, and asking whether it is on 0.2.
    """
    kind = q.device.type
    elsewhere = q.is_cuda and q.device.index != torch.cuda.current_device()
    cast = torch.is_autocast_enabled(kind)
    if not elsewhere and not cast:
        return _NOTHING
    stack = ExitStack()
    if cast:
        stack.enter_context(torch.autocast(kind, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device(q.device))
    return stack


@lru_cache(maxsize=1)
def _triton() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Return modules of the Triton engine, which need the triton package."""
    from powerplan.kernels.triton import replay, run, shapes

    return run, shapes, replay


def forward(
    engine: str,
    inputs: Inputs,
    initial_state: Tensor | None,
    shape: CallShape,
    save_states: bool,
    return_state: bool,
) -> Outputs:
    """Return the outputs of a call; its states are [N, G, D, W] in the layout of PowerState.

    Args:
        engine: "torch" or "triton".
        inputs: The tensors of the call.
        initial_state: [N, G, D, W], or None for an empty one.
        shape: Shape and settings of the call.
        save_states: Whether to save states for the backward pass; the triton engine always does.
        return_state: Whether the final state is wanted.
    """
    with inside(inputs.q):
        if engine == "torch":
            return packed.forward(inputs, initial_state, shape, save_states, return_state)
        run, shapes, replay = _triton()
        launched = shapes.launch_shape(shape, inputs)

        def lay_out() -> Outputs:
            outputs: Outputs = run.forward(inputs, initial_state, launched, return_state)
            return outputs

        name = ("forward", return_state, os.environ.get("POWERPLAN_AUTOTUNE"))
        return Outputs(*replay.repeat(launched.tapes, name, (*inputs, initial_state), lay_out))


def backward(
    engine: str,
    grad_out: Tensor,
    grad_state: Tensor | None,
    inputs: Inputs,
    outputs: Outputs,
    shape: CallShape,
    has_initial_state: bool,
) -> Gradients:
    """Return the gradients of the inputs, each in its own dtype, and of the initial state, [N, G, D, W].

    Args:
        engine: "torch" or "triton", the one that ran forward.
        grad_out: [B, T, H, V], the gradient of the output.
        grad_state: [N, G, D, W], that of the final state; None where there is none.
        inputs: The tensors of the call.
        outputs: What `forward` returned.
        shape: Shape and settings of the call.
        has_initial_state: Whether the call had an initial state.
    """
    with inside(inputs.q):
        if engine == "torch":
            return packed.backward(grad_out, grad_state, inputs, outputs, shape, has_initial_state)
        run, shapes, replay = _triton()
        launched = shapes.launch_shape(shape, inputs)

        def lay_out() -> Gradients:
            grads: Gradients = run.backward(grad_out, grad_state, inputs, outputs, launched, has_initial_state)
            return grads

        tensors = (grad_out, grad_state, *inputs, *outputs)
        name = ("backward", has_initial_state, os.environ.get("POWERPLAN_AUTOTUNE"))
        return Gradients(*replay.repeat(launched.tapes, name, tensors, lay_out))


def state(engine: str, inputs: Inputs, shape: CallShape) -> Tensor:
    """Return the final states alone, [N, G, D, W] in the layout of PowerState, of sequences that start empty.

    Args:
        engine: "torch" or "triton".
        inputs: The tensors of the call. q is a tensor of k's size that is not read.
        shape: Shape and settings of the call, with as many query heads as key/value heads.
    """
    with inside(inputs.k):
        inputs = inputs.with_finite_gates()
        if engine == "torch":
            return packed.state(inputs, shape)
        run, shapes, _ = _triton()
        made: Tensor = run.state(inputs, shapes.launch_shape(shape, inputs))
        return made


def state_backward(
    engine: str, grad_state: Tensor, inputs: Inputs, shape: CallShape
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of k, v and log_g, each in its own dtype; None for log_g without gates.

    The state is homogeneous of degree p in each key, so that k_j.dk_j / p is <dS, S_j> of what token j adds to it. The
    gate of token i acts on all tokens before it: dL/dlog_g_i is the sum of k_j.dk_j / p over j < i.

    Args:
        engine: "torch" or "triton", the one that ran `state`.
        grad_state: [N, G, D, W], the gradient of the states.
        inputs: As `state` took them.
        shape: As `state` took it.
    """
    with inside(inputs.k):
        finite = inputs.with_finite_gates()
        k_dot_dk: Tensor | None
        if engine == "torch":
            grad_k, grad_v, k_dot_dk = packed.state_backward(grad_state, finite, shape)
        else:
            run, shapes, _ = _triton()
            grad_k, grad_v, k_dot_dk = run.state_backward(grad_state, finite, shapes.launch_shape(shape, finite))
        log_g = inputs.log_g
        if log_g is None or k_dot_dk is None:
            return grad_k, grad_v, None
        sums = k_dot_dk.double()
        sums = sums.cumsum(1) - sums  # over the tokens before each, of the sequences before too
        if inputs.cu_seqlens is not None:
            bounds = inputs.cu_seqlens.long()
            tokens = torch.arange(sums.shape[1], device=sums.device)
            sums = sums - sums[:, bounds[torch.searchsorted(bounds, tokens, right=True) - 1]]
        return grad_k, grad_v, sums.masked_fill(log_g < LOWEST_LOG_GATE, 0.0).to(log_g.dtype)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, kv: Tensor, key: Tensor, p: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output [N, H, V] of one token of decoding in Triton, and the new kv and key.

    q [N, H, K], k [N, G, K], v [N, G, V], log_g [N, G], kv [N, G, D, V] and key [N, G, D]; key is empty without a
    normaliser.
    """
    from powerplan.kernels.triton import decode

    with inside(q):
        return decode.step(q, k, v, log_g, kv, key, p, scale)
