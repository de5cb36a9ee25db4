"""`power_state`: what a stretch of tokens leaves behind, without queries.

The state after tokens that follow others is their own state plus the decay over them times the state before. So states
of stretches can be computed apart, on devices apart, and be put together by a scan (distributed/).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerplan.kernels import checks, eager, engines
from powerplan.kernels.api import IMPLEMENTATIONS, NO_GRADIENT_OF_FUNC, NO_TANGENT, requires_gradient
from powerplan.kernels.call import LOWEST_LOG_GATE, CallShape, Inputs
from powerplan.kernels.ops import refuse_batch
from powerplan.kernels.state import PowerState
from powerplan.kernels.state_ops import state_backward_operator, state_operator
from powerplan.kernels.triton.support import lacking


def power_state(
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    p: int = 2,
    chunk_size: int | None = None,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[PowerState, Tensor]:
    """Return the state that these tokens leave behind, and the decay over them: power attention without queries.

    `power_attention` with the same arguments and `return_state` returns this state plus the decay times its initial
    state. Gradients go through both. The arguments are those of `power_attention`.

    Args:
        k: [B, T, G, K] keys.
        v: [B, T, G, V] values, of k's dtype.
        log_g: [B, T, G], the natural logarithm of the gates, or None.
        p: Degree, 1, 2, 3 or 4.
        chunk_size: Tokens per chunk of the chunked implementations.
        normalize: Whether the state is that of normalised attention, with its `key` part.
        cu_seqlens: [N + 1], where packed sequences begin and end.
        impl: As in `power_attention`; all take and return the same states.

    Returns:
        A PowerState of B (or N) sequences, and the decay, [B, G] (or [N, G]) in the state's dtype: the product of the
        gates, 1 without gates.

    Raises:
        ValueError: As `power_attention`.
        TypeError: As `power_attention`.
    """
    state, decay = joined_state(k, v, log_g, p, chunk_size, normalize, cu_seqlens, impl)
    return (PowerState(state[..., :-1], state[..., -1]) if normalize else PowerState(state)), decay


def joined_state(
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    p: int,
    chunk_size: int | None,
    normalize: bool,
    cu_seqlens: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Do what `power_state` does, with the state in one tensor, [N, G, D, W]: its normaliser is the last column."""
    checks.check_tensor("k", k)
    checks.check_tensor("v", v)
    checks.check_tensor("log_g", log_g, or_none=True)
    checks.check_settings(p, None, chunk_size)
    checks.check_flag("normalize", normalize)
    checks.check_impl(impl, IMPLEMENTATIONS)
    checks.check_keys_and_values(k, v, p)
    checks.check_normalizer(p, normalize)
    if log_g is not None:
        checks.check_gate(log_g, k.shape[:3], k.device)
    if cu_seqlens is not None:
        checks.check_packing(cu_seqlens, k, "k")
    if impl == "auto":
        impl = "triton" if k.device.type == "cuda" and lacking(k, v, p) is None else "torch"
    elif impl == "triton" and (reason := lacking(k, v, p)) is not None:
        raise ValueError(f"impl='triton' {reason}")
    # There are no queries: whoever wants their sizes gets those of the keys.
    shape = checks.call_shape(k.shape, k.shape, v.shape, p, 1.0, chunk_size, normalize, impl)
    inputs = Inputs(k, k, v, log_g, cu_seqlens)
    if impl in ("torch", "triton"):
        return _chunked_state(inputs, shape, impl), _decay(inputs)
    silent = inputs._replace(q=torch.zeros_like(k))
    _, state = IMPLEMENTATIONS[impl](silent, None, shape, True)
    assert state is not None, "an implementation returns the state that is asked for"
    joined = state.kv if state.key is None else torch.cat((state.kv, state.key[..., None]), -1)
    return joined, _decay(inputs)


def _chunked_state(inputs: Inputs, shape: CallShape, engine: str) -> Tensor:
    _, k, v, log_g, cu_seqlens = inputs
    if eager.has_tangent(k, v, log_g):
        raise ValueError(NO_TANGENT.format(engine))
    if eager.is_differentiated_by_func(k, v, log_g):
        raise ValueError(NO_GRADIENT_OF_FUNC.format(engine))
    if eager.is_eager(*inputs):
        if requires_gradient(k, v, log_g):
            state: Tensor = ChunkedState.apply(k, v, log_g, cu_seqlens, shape, engine)  # type: ignore[no-untyped-call]
            return state
        return engines.state(engine, inputs, shape)
    made: Tensor = state_operator(k, v, log_g, cu_seqlens, shape.p, shape.chunk_size, shape.normalize, engine)
    return made


class ChunkedState(torch.autograd.Function):
    """The state of a chunked implementation, with its gradients. The second ones are refused."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor | None, shape: CallShape, engine: str
    ) -> Tensor:
        ctx.save_for_backward(k, v, log_g, cu_seqlens)
        ctx.call = shape, engine
        return engines.state(engine, Inputs(k, k, v, log_g, cu_seqlens), shape)

    @staticmethod
    def backward(ctx: Any, grad_state: Tensor) -> Any:
        refuse_batch(grad_state)
        k, v, log_g, cu_seqlens = ctx.saved_tensors
        shape, engine = ctx.call
        with torch.no_grad():
            # A mode may be on now that was off before.
            if eager.is_eager(grad_state, k, v, log_g):
                grads: Any = engines.state_backward(engine, grad_state, Inputs(k, k, v, log_g, cu_seqlens), shape)
            else:
                settings = (shape.p, shape.chunk_size, shape.normalize, engine)
                grad_k, grad_v, grad_log_g = state_backward_operator(grad_state, k, v, log_g, cu_seqlens, *settings)
                grads = grad_k, grad_v, None if log_g is None else grad_log_g
        if torch.is_grad_enabled():  # create_graph=True
            grads = eager.NoSecondDerivative.apply(3, *grads, k, v, log_g, grad_state)  # type: ignore[no-untyped-call]
        return *grads, None, None, None


def _decay(inputs: Inputs) -> Tensor:
    """Return the product of the gates of each sequence, [N, G], in the state's dtype."""
    k, log_g, cu_seqlens = inputs.k, inputs.log_g, inputs.cu_seqlens
    high = torch.promote_types(k.dtype, torch.float32)
    if log_g is None:
        return k.new_ones(inputs.sequences, k.shape[2], dtype=high)
    log_g = log_g.clamp(min=LOWEST_LOG_GATE).double()
    if cu_seqlens is None:
        return log_g.sum(1).exp().to(high)
    sums = torch.cat((log_g.new_zeros(1, log_g.shape[2]), log_g[0].cumsum(0)))
    return (sums[cu_seqlens[1:]] - sums[cu_seqlens[:-1]]).exp().to(high)
