"""What power attention means, and what it accepts: checks the arguments, picks an implementation, hands over.

out_i = sum_{j<=i} w_ij v_j / sum_{j<=i} w_ij with w_ij = (scale q_i.k_j)^p exp(a_i - a_j) and a = cumsum(log_g)
(arXiv 2507.04239). Without `normalize` there is no division.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from powerplan.dims import default_chunk_size, spow_dim
from powerplan.kernels.ops import chunked_power, power_step
from powerplan.kernels.recurrent import recurrent, step
from powerplan.kernels.reference import reference
from powerplan.kernels.state import PowerState
from powerplan.kernels.triton.support import CHUNKS, lacking

DEGREES = (1, 2, 3, 4)
LOWEST_GATE = -100.0
"""Gates below exp(-100) = 4e-44 count as that: nothing is left in any dtype, and sums of gates stay finite."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    """Return power attention of degree p, [B, T, H, V] in v's dtype, and the final state if `return_state`.

    q: [B, T, H, K]; k: [B, T, G, K]; v: [B, T, G, V], all of one dtype (float64, float32, bfloat16, float16); H a
        multiple of G, which share key/value heads in order (query head h uses h // (H / G)).
    log_g: [B, T, G], natural log of the gate, <= 0; None is no gate. exp(a_i - a_j) never includes gate j itself. Below
        -100, -inf included, it counts as -100: exp(-100) = 4e-44.
    p: 1, 2, 3 or 4. Odd degrees give weights of both signs, and are refused with `normalize`.
    scale: factor on q.k, 1 / sqrt(K) where None.
    chunk_size: tokens per chunk of the chunked implementation; by head dim and degree where None.
    initial_state: PowerState of B sequences (N with cu_seqlens) to go on from, as returned for what came before.
    cu_seqlens: [N + 1] integers from 0 to T, rising: B is 1 and holds N sequences end to end, which do not see each
        other.
    impl: "reference" (all pairs), "recurrent" (token by token), "torch" (chunked, any device), "triton" (chunked, on a
        GPU), "auto" (triton where the GPU, the dtype and the head dims allow it, else torch).

    Raises ValueError or TypeError that names the argument, what it is and what it should be; values on a GPU are not
    looked at. torch.compile traces the chunked implementations whole. No second derivatives.
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
    chunk = chunk_size or (CHUNKS[p] if impl == "triton" else default_chunk_size(int(q.shape[-1]), p))
    log_g = None if log_g is None else log_g.clamp(min=LOWEST_GATE)
    if cu_seqlens is not None:
        _check_packing(cu_seqlens, q)
    if initial_state is not None:
        count = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        _check_state(initial_state, q, k, v, p, count, normalize)
        initial_state = initial_state if normalize else PowerState(initial_state.kv)
    run = IMPLEMENTATIONS[impl]
    out, state = run(q, k, v, log_g, initial_state, cu_seqlens, Settings(p, scale, chunk, normalize, return_state))
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
    """Return the output of one more token, [B, H, V], and the state after it: what decoding repeats.

    q: [B, H, K]; k: [B, G, K]; v: [B, G, V]; log_g: [B, G] or None; state: PowerState of B sequences, of constant size.
    impl: "recurrent" (plain torch, with gradients), "triton" (one kernel on a GPU, without), "auto" (triton where it
        runs and no gradient is asked for). The other arguments mean what they mean in `power_attention`, and the errors
        are the same.
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
    whole = (q[:, None], k[:, None], v[:, None])
    _check(*whole, None if log_g is None else log_g[:, None], p, normalize)
    _check_state(state, *whole, p, q.shape[0], normalize)
    given = (q, k, v, log_g, *state)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if impl == "auto":
        fits = q.device.type == "cuda" and lacking(whole[0], whole[2], p) is None
        impl = "triton" if fits and not differentiated else "recurrent"
    elif impl == "triton":
        if (reason := lacking(whole[0], whole[2], p)) is not None:
            raise ValueError(f"impl='triton' {reason}")
        if differentiated:
            raise ValueError("impl='triton' has no gradients for a step: use impl='recurrent', or torch.no_grad()")
    log_g = None if log_g is None else log_g.clamp(min=LOWEST_GATE)
    scale = _scale(scale, q.shape[-1])
    if impl == "triton":
        key = state.key if normalize and state.key is not None else state.kv.new_empty(0)
        out, kv, key = power_step(q, k, v, log_g, state.kv, key, p, scale)
        return out, PowerState(kv, key if normalize else None)
    with torch.autocast(q.device.type, enabled=False):
        return step(q, k, v, log_g, state, p=p, scale=scale, normalize=normalize)


def empty_state(k: Tensor, v: Tensor, p: int, normalize: bool = True) -> PowerState:
    """Return the state of sequences that have not begun, for k [B, T, G, K] and v [B, T, G, V]."""
    if k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"k and v must have the dims batch, time, heads, head dim: {list(k.shape)}, {list(v.shape)}")
    dtype = torch.promote_types(k.dtype, torch.float32)
    size = (k.shape[0], k.shape[2], spow_dim(int(k.shape[3]), p))
    kv = k.new_zeros(*size, v.shape[3], dtype=dtype)
    return PowerState(kv, k.new_zeros(size, dtype=dtype) if normalize else None)


@dataclass(frozen=True)
class Settings:
    """How a call attends, the same for all implementations."""

    p: int
    scale: float
    chunk: int
    normalize: bool
    want_state: bool


Implementation = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, PowerState | None, Tensor | None, Settings], tuple[Tensor, PowerState]
]


def _one_by_one(function: Callable[..., tuple[Tensor, PowerState]], start_empty: bool) -> Implementation:
    """Return the implementation that calls `function` for each of the packed sequences, or once for rows of a batch."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor | None,
        state: PowerState | None,
        cu_seqlens: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, PowerState]:
        how = {"p": settings.p, "scale": settings.scale, "normalize": settings.normalize}
        if state is None and start_empty:
            count = k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            state = empty_state(k[:1].expand(count, -1, -1, -1), v, settings.p, settings.normalize)
        with torch.autocast(q.device.type, enabled=False):
            if cu_seqlens is None:
                return function(q, k, v, log_g, state, **how)
            outs, ends = [], []
            for index, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
                part = (None if x is None else x[:, start:stop] for x in (q, k, v, log_g))
                own = None if state is None else _one(state, index)
                out, end = function(*part, own, **how)
                outs.append(out)
                ends.append(end)
        keys = [end.key for end in ends if end.key is not None]
        return torch.cat(outs, 1), PowerState(torch.cat([end.kv for end in ends]), torch.cat(keys) if keys else None)

    return run


def _one(state: PowerState, index: int) -> PowerState:
    part = slice(index, index + 1)
    return PowerState(state.kv[part], None if state.key is None else state.key[part])


def _by_chunks(engine: str) -> Implementation:
    """Return the chunked implementation with that engine of the operators."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor | None,
        state: PowerState | None,
        cu_seqlens: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, PowerState]:
        whole = None
        if state is not None:
            whole = state.kv if state.key is None else torch.cat((state.kv, state.key[..., None]), -1)
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, log_g, whole))
        how = (settings.p, settings.scale, settings.chunk, settings.normalize)
        out, final, *_ = chunked_power(q, k, v, log_g, whole, cu_seqlens, *how, keep, settings.want_state, engine)
        if settings.want_state and settings.normalize:
            return out, PowerState(final[..., :-1], final[..., -1])
        return out, PowerState(final)

    return run


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": _one_by_one(reference, start_empty=False),
    "recurrent": _one_by_one(recurrent, start_empty=True),
    "torch": _by_chunks("torch"),
    "triton": _by_chunks("triton"),
}


def _scale(scale: float | None, key_dim: int) -> float:
    if scale is None:
        return float(key_dim**-0.5)
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
    top = _values(log_g.detach().max())
    if top is not None and not top <= 0:
        raise ValueError(f"log_g must be at most 0 (a gate of at most 1), and its largest value is {top:g}")


def _values(x: Tensor) -> Any:
    """Return x.tolist(), or None where that would wait for a GPU, cannot be traced, or there are no values."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return x.tolist()
    except RuntimeError:  # Fake tensors, and the wrappers of torch.func, have no values.
        return None


def _check_state(state: PowerState, q: Tensor, k: Tensor, v: Tensor, p: int, count: int, normalize: bool) -> None:
    if not isinstance(state, PowerState):
        raise TypeError(f"the state must be a PowerState, and is {type(state).__name__}")
    size = [count, k.shape[2], spow_dim(int(k.shape[3]), p)]
    dtype = torch.promote_types(q.dtype, torch.float32)
    wanted = {"kv": [*size, v.shape[3]], "key": size}
    for name, shape in wanted.items():
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
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        found = f"{cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens must be at least 2 integers in one dim, and is {found}")
    bounds = _values(cu_seqlens)
    if bounds is not None and (bounds[0] != 0 or bounds[-1] != q.shape[1] or any(a >= b for a, b in pairwise(bounds))):
        raise ValueError(f"cu_seqlens must rise from 0 to {q.shape[1]}, the length of q, and is {bounds[:8]}")
