"""The chunked implementations where nothing but torch's own autograd looks on: without an operator of torch.library.

An operator is what torch.compile, fake tensors, modes that see every operator, and the transforms of torch.func need
(ops.py). A training step in eager mode needs gradients only, and an autograd.Function costs the host less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from powerplan.kernels import engines
from powerplan.kernels.call import CallShape, Inputs, Outputs
from powerplan.kernels.ops import NO_SECOND_DERIVATIVE, backward_operator, refuse_batch

_PLAIN = (Tensor, Parameter)
"""The types of tensors that nothing but autograd looks at; any other may have ideas of its own about operators."""


def is_eager(*tensors: Tensor | None) -> bool:
    """Return whether a call may do without the operators: no trace, no mode, no transform, no wrapped tensor.

    Takes 1 us. Each of these would otherwise miss the call, or see what happens inside it: torch.compile and export,
    make_fx and torch.jit.trace; FlopCounterMode, fake tensors' mode and selective checkpointing; vmap, grad and jvp of
    torch.func; fake and distributed tensors. Tensors on the meta device have nothing to compute with.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # all modes; torch.utils has a name for the innermost only
        or torch._C._are_functorch_transforms_active()  # what autograd.Function.apply asks
        or torch._C._is_tracing()
    ):
        return False
    return all(x is None or (type(x) in _PLAIN and not x.is_meta) for x in tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Return whether a tensor carries a forward-mode derivative: of forward_ad, or of torch.func's jvp and jacfwd.

    A tensor that torch.func wrapped for a jvp counts as one that does: within a grad of torch.func, as in hessian, its
    tangent cannot be asked for.
    """
    # torch.func's jvp opens a level of forward_ad too.
    return forward_ad._current_level >= 0 and any(x is not None and _has_tangent(x) for x in tensors)


def _has_tangent(x: Tensor) -> bool:
    wrapped, x = _unwrapped(x, "Jvp")
    return wrapped or forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def is_differentiated_by_func(*tensors: Tensor | None) -> bool:
    """Return whether grad, vjp or jacrev of torch.func wrapped a tensor. No operator has gradients there (torch 2.13).

    What torch.library makes of their formulas is an autograd.Function of the kind that torch.func does not take.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(x is not None and _unwrapped(x, "Grad")[0] for x in tensors)


def _unwrapped(x: Tensor, key: str) -> tuple[bool, Tensor]:
    """Return whether a transform of torch.func with this key wrapped x, and x without the wrappers of transforms."""
    functorch = torch._C._functorch
    levels = [level.level() for level in functorch.get_interpreter_stack() or () if level.key().name == key]
    found = False
    while functorch.is_functorch_wrapped_tensor(x):
        found = found or functorch.maybe_get_level(x) in levels
        x = functorch.get_unwrapped(x)
    return found, x


def call(
    inputs: Inputs,
    initial_state: Tensor | None,
    shape: CallShape,
    needs_gradient: bool,
    return_state: bool,
    engine: str,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [B, T, H, V], and the final state [N, G, D, W] where it is wanted; `is_eager` must hold.

    Args:
        inputs: The tensors of the call.
        initial_state: [N, G, D, W], or None for an empty one.
        shape: Shape and settings of the call.
        needs_gradient: Whether gradients are recorded and any tensor requires one.
        return_state: Whether the final state is wanted.
        engine: "torch" or "triton".
    """
    if not needs_gradient:
        outputs = engines.forward(engine, inputs, initial_state, shape, False, return_state)
        return outputs.out, outputs.final_state
    out, final_state = ChunkedPower.apply(*inputs, initial_state, shape, return_state, engine)  # type: ignore[no-untyped-call]
    return out, final_state


class ChunkedPower(torch.autograd.Function):
    """Chunked power attention with its gradients. The second ones are refused."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """Take the five Inputs, the initial state, CallShape, whether the final state is wanted, and the engine."""
        inputs, (initial_state, shape, return_state, engine) = Inputs(*arguments[:5]), arguments[5:]
        outputs = engines.forward(engine, inputs, initial_state, shape, True, return_state)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *outputs)
        ctx.call = engine, shape, initial_state is not None
        return outputs.out, outputs.final_state

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():  # compiled autograd
            refuse_batch(*grads)
        grad_out, grad_state = grads
        saved = ctx.saved_tensors
        inputs, outputs = Inputs(*saved[:5]), Outputs(*saved[5:])
        engine, shape, has_initial_state = ctx.call
        if grad_out is None:
            grad_out = torch.zeros_like(outputs.out)
        # A mode may be on now that was off before, and compiled autograd traces this.
        run = engines.backward if is_eager(grad_out, grad_state, *saved) else backward_operator
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                made = run(engine, grad_out, grad_state, inputs, outputs, shape, has_initial_state)
            made = NoSecondDerivative.apply(5, *made, *inputs, grad_out, grad_state)  # type: ignore[no-untyped-call]
        else:
            made = run(engine, grad_out, grad_state, inputs, outputs, shape, has_initial_state)
        q, k, v, log_g, initial_state = made
        return q, k, v, log_g, None, initial_state, None, None, None


class NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through, and is itself an error to differentiate."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Take `count` gradients, and then the tensors that they depend on."""
        return tuple(None if x is None else x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
