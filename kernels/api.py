"""What power attention means and accepts: checks the arguments, picks an implementation, and calls it.

out_i = sum_{j<=i} w_ij v_j / sum_{j<=i} w_ij with w_ij = (scale q_i.k_j)^p exp(a_i - a_j) and a = cumsum(log_g)
(arXiv 2507.04239). Without `normalize` there is no division.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from powerplan.dims import spow_dim
from powerplan.kernels import checks, eager, engines
from powerplan.kernels.call import LOWEST_LOG_GATE, CallShape, Inputs
from powerplan.kernels.ops import chunked_power, power_step
from powerplan.kernels.recurrent import recurrent, step
from powerplan.kernels.reference import reference
from powerplan.kernels.state import PowerState
from powerplan.kernels.triton.support import lacking

if TYPE_CHECKING:
    from powerplan.kernels.distributed.attention import Started
    from powerplan.kernels.distributed.plan import ContextParallel


@overload
def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    p: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    normalize: bool = True,
    initial_state: PowerState | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    cp: ContextParallel | Started | None = None,
) -> Tensor: ...


@overload
def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    p: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    normalize: bool = True,
    initial_state: PowerState | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    cp: ContextParallel | Started | None = None,
) -> tuple[Tensor, PowerState]: ...


@overload
def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    p: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    normalize: bool = True,
    initial_state: PowerState | None = None,
    return_state: bool,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    cp: ContextParallel | Started | None = None,
) -> Tensor | tuple[Tensor, PowerState]: ...


def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    p: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    normalize: bool = True,
    initial_state: PowerState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    cp: ContextParallel | Started | None = None,
) -> Tensor | tuple[Tensor, PowerState]:
    """Return power attention of degree p, and on demand the state after the last token.

    out_i = sum_{j<=i} w_ij v_j / sum_{j<=i} w_ij, with w_ij = (scale q_i.k_j)^p exp(a_i - a_j) and a = cumsum(log_g)
    (Gelada, Buckman, Zhang, Bach, "Scaling Context Requires Rethinking Attention", arXiv 2507.04239). exp(a_i - a_j)
    does not include the gate of token j itself.

    torch.compile traces the chunked implementations whole. There are no second derivatives.

    Args:
        q: [B, T, H, K] queries, float64, float32, bfloat16 or float16. Time comes before heads, unlike in
            scaled_dot_product_attention.
        k: [B, T, G, K] keys, of q's dtype. H is a multiple of G; query head h uses key/value head h // (H / G).
        v: [B, T, G, V] values, of q's dtype.
        log_g: [B, T, G], the natural logarithm of the gates, at most 0; None for no gates. Values below -100, -inf
            included, count as -100: exp(-100) = 4e-44.
        p: Degree, 1, 2, 3 or 4. Odd degrees give weights of both signs, and are refused with `normalize`.
        scale: Factor on q.k; None for 1 / sqrt(K).
        chunk_size: Tokens per chunk of the chunked implementations; None for `powerplan.dims.default_chunk_size` of the
            implementation.
        normalize: Whether to divide by the sum of the weights. A query gets 0 whose weights sum to less than
            1.2e-38, the least normal float32 (float64 inputs: 2.2e-308); and NaN where the sum overflows.
        initial_state: State of the tokens before these, as an earlier call returned it: one sequence for each row of
            the batch, or for each of the packed sequences. None for none.
        return_state: Whether to return the state after the last token too.
        cu_seqlens: [N + 1] int32 or int64 on q's device, rising from 0 to T. B is 1, and the row holds N sequences end
            to end, which do not see each other. None where each row of the batch is one sequence.
        impl: "reference" (all pairs), "recurrent" (token by token), "torch" (in chunks, on any device), "triton" (in
            chunks, on a GPU), or "auto": triton where the GPU, the dtype and the head dims allow it, else torch.
        cp: A ContextParallel plan, where each rank of a process group has some of the tokens: q, k, v and log_g are
            those of this rank, and so is the output. Or what the plan's `start` returned. States are those of all
            sequences, on every rank: give the same `initial_state` on each, whose gradients are to be summed over
            ranks, as those of weights are; the gradient of a returned state is the sum over ranks. The plan has the
            cu_seqlens. Every rank makes the call, and every rank goes backward through it (docs/distributed.md).

    Returns:
        The output, [B, T, H, V] in v's dtype; with `return_state`, the output and a PowerState of B (or N) sequences.

    Raises:
        ValueError: An argument has a value, a size, a dtype or a device that is not allowed, or `impl` cannot run here.
            The message names the argument, what it is and what it should be. Values on a GPU are not looked at.
        TypeError: An argument has a type, or q a dtype, that is not allowed.
    """
    if cp is not None:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens belongs to the plan where cp is given: ContextParallel(cu_seqlens=...)")
        from powerplan.kernels.distributed.attention import attend

        given = (q, k, v, log_g, p, scale, chunk_size, normalize, initial_state, return_state, impl)
        answer: Tensor | tuple[Tensor, PowerState] = attend(cp, *given)
        return answer
    checks.check_types(q, k, v, log_g)
    checks.check_settings(p, scale, chunk_size)
    checks.check_flag("normalize", normalize)
    checks.check_flag("return_state", return_state)
    checks.check_impl(impl, IMPLEMENTATIONS)
    check_sizes: checks.CheckSizes
    call_shape: checks.MakeShape
    if eager.is_eager(q, k, v):
        check_sizes, call_shape = checks.check_sizes_once, checks.call_shape_once
    else:
        check_sizes, call_shape = checks.check_sizes, checks.call_shape
    sizes, device = (q.shape, k.shape, v.shape), q.device
    check_sizes(*sizes, (q.dtype, k.dtype, v.dtype), (device, k.device, v.device), p, normalize)
    checks.check_scale(scale, p, q.dtype)
    if log_g is not None:
        checks.check_gate(log_g, sizes[1][:3], device)
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and lacking(q, v, p) is None else "torch"
    elif impl == "triton" and (reason := lacking(q, v, p)) is not None:
        raise ValueError(f"impl='triton' {reason}")
    if cu_seqlens is not None:
        checks.check_packing(cu_seqlens, q)
        if impl in ("reference", "recurrent") and cu_seqlens.is_meta:
            raise ValueError(f"impl={impl!r} reads cu_seqlens, which has no values on the meta device")
    inputs = Inputs(q, k, v, log_g, cu_seqlens)
    if initial_state is not None:
        checks.check_state(initial_state, q, k, v, p, inputs.sequences, normalize)
        initial_state = initial_state if normalize else PowerState(initial_state.kv)
    shape = call_shape(*sizes, p, scale, chunk_size, normalize, impl)
    out, state = IMPLEMENTATIONS[impl](inputs, initial_state, shape, return_state)
    if not return_state:
        return out
    assert state is not None, "an implementation returns the state that is asked for"
    return out, state


def power_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: PowerState,
    *,
    p: int = 2,
    scale: float | None = None,
    normalize: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, PowerState]:
    """Return the output of one more token, and the state after it: what decoding repeats.

    The state has a constant size, so that a step costs the same after any number of tokens.

    Args:
        q: [B, H, K] queries of the token.
        k: [B, G, K] keys, of q's dtype.
        v: [B, G, V] values, of q's dtype.
        log_g: [B, G], the natural logarithm of the gates, or None.
        state: PowerState of B sequences, of the tokens before; `empty_state` for none.
        p: Degree, as in `power_attention`.
        scale: Factor on q.k, as in `power_attention`.
        normalize: Whether to divide by the sum of the weights, as in `power_attention`.
        impl: "recurrent" (plain torch, with gradients), "triton" (one kernel on a GPU, without gradients), or "auto":
            triton where it runs and no gradient is asked for, else recurrent.

    Returns:
        The output, [B, H, V] in v's dtype, and the new state. The old one is not changed.

    Raises:
        ValueError: As `power_attention`, and for a gradient through impl="triton".
        TypeError: As `power_attention`.
    """
    checks.check_types(q, k, v, log_g)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must have the dims batch, heads, head dim, and has shape {list(x.shape)}")
    checks.check_impl(impl, ("recurrent", "triton"))
    checks.check_settings(p, scale, None)
    checks.check_flag("normalize", normalize)
    timed = (q[:, None], k[:, None], v[:, None])  # with a time dim of one token
    sizes, device = (timed[0].shape, timed[1].shape, timed[2].shape), q.device
    checks.check_sizes(*sizes, (q.dtype, k.dtype, v.dtype), (device, k.device, v.device), p, normalize)
    checks.check_scale(scale, p, q.dtype)
    if log_g is not None:
        checks.check_gate(log_g, k.shape[:2], device)
    checks.check_state(state, *timed, p, q.shape[0], normalize)
    needs_gradient = requires_gradient(q, k, v, log_g, *state)
    has_tangent = eager.has_tangent(q, k, v, log_g, *state)
    if impl == "auto":
        fits = q.device.type == "cuda" and lacking(timed[0], timed[2], p) is None
        impl = "triton" if fits and not needs_gradient and not has_tangent else "recurrent"
    elif impl == "triton":
        if (reason := lacking(timed[0], timed[2], p)) is not None:
            raise ValueError(f"impl='triton' {reason}")
        if needs_gradient:
            raise ValueError("impl='triton' has no gradients for a step: use impl='recurrent', or torch.no_grad()")
        if has_tangent:
            raise ValueError(NO_TANGENT.format("triton"))
    log_g = None if log_g is None else log_g.clamp(min=LOWEST_LOG_GATE)
    scale = checks.scale_of(scale, int(q.shape[-1]))
    if impl == "triton":
        key = state.key if normalize and state.key is not None else state.kv.new_empty(0)
        one_step = engines.step if eager.is_eager(q, k, v, log_g, *state) else power_step
        out, kv, key = one_step(q, k, v, log_g, state.kv, key, p, scale)
        return out, PowerState(kv, key if normalize else None)
    with _without_autocast(q):
        return step(q, k, v, log_g, state, p=p, scale=scale, normalize=normalize)


def empty_state(k: Tensor, v: Tensor, p: int, normalize: bool = True) -> PowerState:
    """Return the state of B sequences that have not begun, all zeros.

    Args:
        k: [B, T, G, K] keys, for their sizes, dtype and device.
        v: [B, T, G, V] values, for their sizes.
        p: Degree of the attention.
        normalize: Whether the attention is normalised, and its state needs the `key` part.

    Returns:
        A PowerState in float32, or in float64 for float64 keys.

    Raises:
        ValueError: k, v or p has a value, a size, a dtype or a device that is not allowed, as in `power_attention`.
        TypeError: An argument has a type, or k a dtype, that is not allowed.
    """
    checks.check_tensor("k", k)
    checks.check_tensor("v", v)
    checks.check_settings(p, None, None)
    checks.check_flag("normalize", normalize)
    checks.check_keys_and_values(k, v, p)
    return _empty_state(k.shape[0], k, v, p, normalize)


def _empty_state(sequences: int, k: Tensor, v: Tensor, p: int, normalize: bool) -> PowerState:
    dtype = torch.promote_types(k.dtype, torch.float32)
    size = (sequences, k.shape[2], spow_dim(int(k.shape[3]), p))
    kv = k.new_zeros(*size, v.shape[3], dtype=dtype)
    return PowerState(kv, k.new_zeros(size, dtype=dtype) if normalize else None)


NO_TANGENT = (
    "impl={!r} has no forward-mode derivatives, and one was asked for (torch.func.jvp, jacfwd, hessian, or "
    "torch.autograd.forward_ad): use impl='reference' or impl='recurrent'"
)

NO_GRADIENT_OF_FUNC = (
    "impl={!r} has no gradients by torch.func (grad, vjp, jacrev): use torch.autograd, or impl='reference' or "
    "impl='recurrent'"
)

Implementation = Callable[[Inputs, PowerState | None, CallShape, bool], tuple[Tensor, PowerState | None]]
"""Takes the inputs, the initial state, the call's shape, and whether the final state is wanted.

It returns the output and the final state, or None for a state that is not wanted and that nothing has computed.
"""


def _one_by_one(function: Callable[..., tuple[Tensor, PowerState]], start_empty: bool) -> Implementation:
    """Return the implementation that calls `function` for each of the packed sequences, or once for rows of a batch."""

    def run(
        inputs: Inputs, state: PowerState | None, shape: CallShape, return_state: bool
    ) -> tuple[Tensor, PowerState]:
        inputs = inputs.with_finite_gates()
        if state is None and start_empty:
            state = _empty_state(inputs.sequences, inputs.k, inputs.v, shape.p, shape.normalize)
        with _without_autocast(inputs.q):
            if inputs.cu_seqlens is None:
                return function(inputs, state, shape)
            outs, ends = [], []
            for index, (start, stop) in enumerate(pairwise(inputs.cu_seqlens.tolist())):
                own_state = None if state is None else _of_sequence(state, index)
                out, end = function(inputs.at(slice(start, stop)), own_state, replace(shape, tokens=stop - start))
                outs.append(out)
                ends.append(end)
        keys = [end.key for end in ends if end.key is not None]
        return torch.cat(outs, 1), PowerState(torch.cat([end.kv for end in ends]), torch.cat(keys) if keys else None)

    return run


def _of_sequence(state: PowerState, index: int) -> PowerState:
    part = slice(index, index + 1)
    return PowerState(state.kv[part], None if state.key is None else state.key[part])


def _by_chunks(engine: str) -> Implementation:
    """Return the chunked implementation with this engine of the operators."""

    def run(
        inputs: Inputs, state: PowerState | None, shape: CallShape, return_state: bool
    ) -> tuple[Tensor, PowerState | None]:
        q, k, v, log_g, cu_seqlens = inputs
        joined = None  # the state with its normaliser as the last column, [N, G, D, W]
        if state is not None:
            joined = state.kv if state.key is None else torch.cat((state.kv, state.key[..., None]), -1)
        if eager.has_tangent(q, k, v, log_g, joined):
            raise ValueError(NO_TANGENT.format(engine))
        needs_gradient = requires_gradient(q, k, v, log_g, joined)
        if eager.is_differentiated_by_func(q, k, v, log_g, joined):
            raise ValueError(NO_GRADIENT_OF_FUNC.format(engine))
        final_state: Tensor | None
        if eager.is_eager(*inputs, joined):
            out, final_state = eager.call(inputs, joined, shape, needs_gradient, return_state, engine)
        else:
            settings = (shape.p, shape.scale, shape.chunk_size, shape.normalize, needs_gradient, return_state, engine)
            out, final_state, *_ = chunked_power(q, k, v, log_g, joined, cu_seqlens, *settings)
        if final_state is None or not return_state:
            return out, None
        if shape.normalize:
            return out, PowerState(final_state[..., :-1], final_state[..., -1])
        return out, PowerState(final_state)

    return run


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": _one_by_one(reference, start_empty=False),
    "recurrent": _one_by_one(recurrent, start_empty=True),
    "torch": _by_chunks("torch"),
    "triton": _by_chunks("triton"),
}


def _without_autocast(q: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False)


def requires_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and asks for the gradient of a tensor; None asks for none."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
