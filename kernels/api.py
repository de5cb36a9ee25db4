"""What power attention means and accepts: checks the arguments, picks an implementation, and calls it.

out_i = sum_{j<=i} w_ij v_j / sum_{j<=i} w_ij with w_ij = (scale q_i.k_j)^p exp(a_i - a_j) and a = cumsum(log_g)
(arXiv 2507.04239). Without `normalize` there is no division.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from powerplan.dims import KERNEL_DEGREES, default_chunk_size, spow_dim
from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.ops import chunked_power, power_step
from powerplan.kernels.recurrent import recurrent, step
from powerplan.kernels.reference import reference
from powerplan.kernels.state import PowerState
from powerplan.kernels.triton.support import lacking

DEGREES = KERNEL_DEGREES
"""The degrees p that all implementations execute."""

LOWEST_LOG_GATE = -100.0
"""The lowest log_g that counts; lower ones, -inf included, count as this one.

exp(-100) = 4e-44 leaves nothing of the past in any dtype, and the sums of these gates stay finite.
"""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that q, k and v may have."""


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
) -> Tensor | tuple[Tensor, PowerState]:
    """Return power attention of degree p, and on demand the state after the last token.

    out_i = sum_{j<=i} w_ij v_j / sum_{j<=i} w_ij, with w_ij = (scale q_i.k_j)^p exp(a_i - a_j) and a = cumsum(log_g)
    (Gelada, Buckman, Zhang, Bach, "Scaling Context Requires Rethinking Attention", arXiv 2507.04239). exp(a_i - a_j)
    does not include the gate of token j itself.

    torch.compile traces the chunked implementations whole. There are no second derivatives.

    Args:
        q: [B, T, H, K] queries, float64, float32, bfloat16 or float16.
        k: [B, T, G, K] keys, of q's dtype. H is a multiple of G; query head h uses key/value head h // (H / G).
        v: [B, T, G, V] values, of q's dtype.
        log_g: [B, T, G], the natural logarithm of the gates, at most 0; None for no gates. Values below -100, -inf
            included, count as -100: exp(-100) = 4e-44.
        p: Degree, 1, 2, 3 or 4. Odd degrees give weights of both signs, and are refused with `normalize`.
        scale: Factor on q.k; None for 1 / sqrt(K).
        chunk_size: Tokens per chunk of the chunked implementations; None for `powerplan.dims.default_chunk_size` of the
            implementation.
        normalize: Whether to divide by the sum of the weights. A query whose weights are all 0 gets 0.
        initial_state: State of the tokens before these, as an earlier call returned it: one sequence for each row of
            the batch, or for each of the packed sequences. None for none.
        return_state: Whether to return the state after the last token too.
        cu_seqlens: [N + 1] int32 or int64 on q's device, rising from 0 to T. B is 1, and the row holds N sequences end
            to end, which do not see each other. None where each row of the batch is one sequence.
        impl: "reference" (all pairs), "recurrent" (token by token), "torch" (in chunks, on any device), "triton" (in
            chunks, on a GPU), or "auto": triton where the GPU, the dtype and the head dims allow it, else torch.

    Returns:
        The output, [B, T, H, V] in v's dtype; with `return_state`, the output and a PowerState of B (or N) sequences.

    Raises:
        ValueError: An argument has a value, a size, a dtype or a device that is not allowed, or `impl` cannot run here.
            The message names the argument, what it is and what it should be. Values on a GPU are not looked at.
        TypeError: An argument has a type, or q a dtype, that is not allowed.
    """
    _check(q, k, v, log_g, p, normalize)
    scale = _scale(scale, q.shape[-1])
    if chunk_size is not None and (not _is_integer(chunk_size) or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer of at least 1, and is {chunk_size!r}")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl must be auto, {', '.join(IMPLEMENTATIONS)}, and is {impl!r}")
    if impl == "auto":
        impl = "triton" if q.device.type == "cuda" and lacking(q, v, p) is None else "torch"
    elif impl == "triton" and (reason := lacking(q, v, p)) is not None:
        raise ValueError(f"impl='triton' {reason}")
    if chunk_size is None:
        chunk_size = default_chunk_size(int(q.shape[-1]), p, "triton" if impl == "triton" else "torch")
    log_g = None if log_g is None else log_g.clamp(min=LOWEST_LOG_GATE)
    if cu_seqlens is not None:
        _check_packing(cu_seqlens, q)
    inputs = Inputs(q, k, v, log_g, cu_seqlens)
    if initial_state is not None:
        _check_state(initial_state, q, k, v, p, inputs.sequences, normalize)
        initial_state = initial_state if normalize else PowerState(initial_state.kv)
    shape = CallShape.of(q.shape, k.shape, v.shape, p, scale, chunk_size, normalize)
    out, state = IMPLEMENTATIONS[impl](inputs, initial_state, shape, return_state)
    return (out, state) if return_state else out


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
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, and is {type(x).__name__}")
        if x.ndim != 3:
            raise ValueError(f"{name} must have the dims batch, heads, head dim, and has shape {list(x.shape)}")
    if log_g is not None and not isinstance(log_g, Tensor):
        raise TypeError(f"log_g must be a tensor or None, and is {type(log_g).__name__}")
    if impl not in ("auto", "recurrent", "triton"):
        raise ValueError(f"impl must be auto, recurrent, triton, and is {impl!r}")
    timed = (q[:, None], k[:, None], v[:, None])  # with a time dim of one token
    _check(*timed, None if log_g is None else log_g[:, None], p, normalize)
    _check_state(state, *timed, p, q.shape[0], normalize)
    needs_gradient = _needs_gradient(q, k, v, log_g, *state)
    if impl == "auto":
        fits = q.device.type == "cuda" and lacking(timed[0], timed[2], p) is None
        impl = "triton" if fits and not needs_gradient else "recurrent"
    elif impl == "triton":
        if (reason := lacking(timed[0], timed[2], p)) is not None:
            raise ValueError(f"impl='triton' {reason}")
        if needs_gradient:
            raise ValueError("impl='triton' has no gradients for a step: use impl='recurrent', or torch.no_grad()")
    log_g = None if log_g is None else log_g.clamp(min=LOWEST_LOG_GATE)
    scale = _scale(scale, q.shape[-1])
    if impl == "triton":
        key = state.key if normalize and state.key is not None else state.kv.new_empty(0)
        out, kv, key = power_step(q, k, v, log_g, state.kv, key, p, scale)
        return out, PowerState(kv, key if normalize else None)
    with torch.autocast(q.device.type, enabled=False):
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
        ValueError: k or v has not got four dims.
    """
    if k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"k and v must have the dims batch, time, heads, head dim: {list(k.shape)}, {list(v.shape)}")
    dtype = torch.promote_types(k.dtype, torch.float32)
    size = (k.shape[0], k.shape[2], spow_dim(int(k.shape[3]), p))
    kv = k.new_zeros(*size, v.shape[3], dtype=dtype)
    return PowerState(kv, k.new_zeros(size, dtype=dtype) if normalize else None)


Implementation = Callable[[Inputs, PowerState | None, CallShape, bool], tuple[Tensor, PowerState]]
"""Takes the inputs, the initial state, the call's shape, and whether the final state is wanted.

It returns the output and the final state, which is meaningless where it is not wanted.
"""


def _one_by_one(function: Callable[..., tuple[Tensor, PowerState]], start_empty: bool) -> Implementation:
    """Return the implementation that calls `function` for each of the packed sequences, or once for rows of a batch."""

    def run(
        inputs: Inputs, state: PowerState | None, shape: CallShape, return_state: bool
    ) -> tuple[Tensor, PowerState]:
        if state is None and start_empty:
            k = inputs.k[:1].expand(inputs.sequences, -1, -1, -1)
            state = empty_state(k, inputs.v, shape.p, shape.normalize)
        with torch.autocast(inputs.q.device.type, enabled=False):
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
    ) -> tuple[Tensor, PowerState]:
        q, k, v, log_g, cu_seqlens = inputs
        joined = None  # the state with its normaliser as the last column, [N, G, D, W]
        if state is not None:
            joined = state.kv if state.key is None else torch.cat((state.kv, state.key[..., None]), -1)
        save_states = _needs_gradient(q, k, v, log_g, joined)
        settings = (shape.p, shape.scale, shape.chunk_size, shape.normalize, save_states, return_state, engine)
        out, final_state, *_ = chunked_power(q, k, v, log_g, joined, cu_seqlens, *settings)
        if return_state and shape.normalize:
            return out, PowerState(final_state[..., :-1], final_state[..., -1])
        return out, PowerState(final_state)

    return run


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": _one_by_one(reference, start_empty=False),
    "recurrent": _one_by_one(recurrent, start_empty=True),
    "torch": _by_chunks("torch"),
    "triton": _by_chunks("triton"),
}


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return float(head_dim**-0.5)
    if not isinstance(scale, (int, float)) or not isfinite(scale):
        raise ValueError(f"scale must be a finite number, and is {scale!r}")
    return float(scale)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, p: int, normalize: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, and is {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have the dims batch, time, heads, head dim, and has shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, and q is {q.dtype} on {q.device}; they must agree")
    if q.dtype not in DTYPES:
        raise TypeError(f"q is {q.dtype}; allowed are {', '.join(str(dtype) for dtype in DTYPES)}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "shapes must be q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], and are "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"no dim may be 0: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"the {q.shape[2]} heads of q must be a multiple of the {k.shape[2]} heads of k and v")
    if not _is_integer(p) or p not in DEGREES:
        raise ValueError(f"p must be 1, 2, 3 or 4, and is {p!r}")
    if normalize and p % 2:
        raise ValueError(
            f"p={p} gives weights of both signs, whose sum may be 0 or negative: use an even p, or normalize=False"
        )
    if log_g is not None:
        _check_gate(log_g, k)


def _check_gate(log_g: Tensor, k: Tensor) -> None:
    if not isinstance(log_g, Tensor):
        raise TypeError(f"log_g must be a tensor or None, and is {type(log_g).__name__}")
    if log_g.shape != k.shape[:3]:
        raise ValueError(f"log_g must be [B, T, G] = {list(k.shape[:3])}, and is {list(log_g.shape)}")
    if not log_g.is_floating_point() or log_g.device != k.device:
        raise ValueError(f"log_g must be floating point on {k.device}, and is {log_g.dtype} on {log_g.device}")
    largest = _values(log_g.detach().max())
    if largest is not None and not largest <= 0:
        raise ValueError(f"log_g must be at most 0 (a gate of at most 1), and its largest value is {largest:g}")


def _values(x: Tensor) -> Any:
    """Return x.tolist(); None where that would wait for a GPU or break a trace, or where x has no values."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return x.tolist()
    except RuntimeError:  # Fake tensors, and the wrappers of torch.func, have no values.
        return None


def _check_state(state: PowerState, q: Tensor, k: Tensor, v: Tensor, p: int, sequences: int, normalize: bool) -> None:
    if not isinstance(state, PowerState):
        raise TypeError(f"the state must be a PowerState, and is {type(state).__name__}")
    size = [sequences, k.shape[2], spow_dim(int(k.shape[3]), p)]
    dtype = torch.promote_types(q.dtype, torch.float32)
    shapes = {"kv": [*size, v.shape[3]], "key": size}
    for name, shape in shapes.items():
        x = getattr(state, name)
        if x is None:
            if normalize:
                raise ValueError("the state comes from normalize=False and has no key part, which normalize=True needs")
            continue
        if list(x.shape) != shape:
            raise ValueError(f"the state's {name} must be {shape}, and is {list(x.shape)}")
        if x.dtype != dtype or x.device != q.device:
            raise ValueError(f"the state's {name} must be {dtype} on {q.device}, and is {x.dtype} on {x.device}")


def _check_packing(cu_seqlens: Tensor, q: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, and is {type(cu_seqlens).__name__}")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences in one batch row, and q has {q.shape[0]} rows")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        kind = f"{cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens must be at least 2 integers in one dim, int32 or int64, and is {kind}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens must be on {q.device} as q is, and is on {cu_seqlens.device}")
    bounds, fault = _values(cu_seqlens), None
    if bounds is None:
        return
    falls = next((index for index, (start, stop) in enumerate(pairwise(bounds)) if stop <= start), None)
    if bounds[0] != 0:
        fault = f"begins with {bounds[0]}"
    elif falls is not None:
        fault = f"has {bounds[falls + 1]} after {bounds[falls]} (entry {falls + 1})"
    elif bounds[-1] != q.shape[1]:
        fault = f"ends with {bounds[-1]}"
    if fault is not None:
        raise ValueError(f"cu_seqlens must rise from 0 to {q.shape[1]}, the length of q, and {fault}")
