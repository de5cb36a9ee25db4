"""What arguments power attention takes, with the message for each that it does not.

What depends on sizes, dtypes and settings alone is checked once for each combination of them: 10 us a call otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from powerplan.dims import KERNEL_DEGREES, default_chunk_size, spow_dim
from powerplan.kernels.call import CallShape
from powerplan.kernels.state import PowerState

DEGREES = KERNEL_DEGREES
"""The degrees p that all implementations execute."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that q, k and v may have."""


Size = Sequence[int]
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]
Devices = tuple[torch.device, torch.device, torch.device]
CheckSizes = Callable[[Size, Size, Size, Dtypes, Devices, int, bool], None]
MakeShape = Callable[[Size, Size, Size, int, float | None, int | None, bool, str], CallShape]


def check_types(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, and is {type(x).__name__}")
    if log_g is not None and not isinstance(log_g, Tensor):
        raise TypeError(f"log_g must be a tensor or None, and is {type(log_g).__name__}")


def check_settings(p: int, scale: float | None, chunk_size: int | None) -> None:
    if not _is_integer(p) or p not in DEGREES:
        raise ValueError(f"p must be 1, 2, 3 or 4, and is {p!r}")
    if scale is not None and (not isinstance(scale, (int, float)) or not isfinite(scale)):
        raise ValueError(f"scale must be a finite number, and is {scale!r}")
    if chunk_size is not None and (not _is_integer(chunk_size) or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer of at least 1, and is {chunk_size!r}")


def check_sizes(
    q: Size,
    k: Size,
    v: Size,
    dtypes: Dtypes,
    devices: Devices,
    p: int,
    normalize: bool,
) -> None:
    """Check the sizes of q, k and v, their dtypes and devices, and the degree."""
    for name, shape, dtype, device in zip("qkv", (q, k, v), dtypes, devices, strict=True):
        if len(shape) != 4:
            raise ValueError(f"{name} must have the dims batch, time, heads, head dim, and has shape {list(shape)}")
        if dtype != dtypes[0] or device != devices[0]:
            raise ValueError(f"{name} is {dtype} on {device}, and q is {dtypes[0]} on {devices[0]}; they must agree")
    if dtypes[0] not in DTYPES:
        raise TypeError(f"q is {dtypes[0]}; allowed are {', '.join(str(dtype) for dtype in DTYPES)}")
    if q[:2] != k[:2] or k[:3] != v[:3] or q[3] != k[3]:
        raise ValueError(
            "shapes must be q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], and are "
            f"q {list(q)}, k {list(k)}, v {list(v)}"
        )
    if 0 in (*q, *k, *v):
        raise ValueError(f"no dim may be 0: q {list(q)}, k {list(k)}, v {list(v)}")
    if q[2] % k[2]:
        raise ValueError(f"the {q[2]} heads of q must be a multiple of the {k[2]} heads of k and v")
    if normalize and p % 2:
        raise ValueError(
            f"p={p} gives weights of both signs, whose sum may be 0 or negative: use an even p, or normalize=False"
        )


def call_shape(
    q: Size,
    k: Size,
    v: Size,
    p: int,
    scale: float | None,
    chunk_size: int | None,
    normalize: bool,
    impl: str,
) -> CallShape:
    """Return the shape of a call on tensors of these sizes, with the defaults of `impl` for what is None."""
    head_dim = int(q[3])
    if chunk_size is None:
        chunk_size = default_chunk_size(head_dim, p, "triton" if impl == "triton" else "torch")
    return CallShape.of(q, k, v, p, scale_of(scale, head_dim), chunk_size, normalize)


# Sizes that are traced are no keys: these are for calls in eager mode. With `typed`, True is not 1.
check_sizes_once: CheckSizes = lru_cache(maxsize=1024, typed=True)(check_sizes)
call_shape_once: MakeShape = lru_cache(maxsize=1024, typed=True)(call_shape)


def scale_of(scale: float | None, head_dim: int) -> float:
    """Return the scale of a call, by default 1 / sqrt(head_dim)."""
    return float(head_dim**-0.5) if scale is None else float(scale)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_gate(log_g: Tensor, size: Size, device: torch.device) -> None:
    """Check log_g against the first three sizes of k, [B, T, G], and against k's device."""
    if log_g.shape != size:
        raise ValueError(f"log_g must be [B, T, G] = {list(size)}, and is {list(log_g.shape)}")
    if not log_g.is_floating_point() or log_g.device != device:
        raise ValueError(f"log_g must be floating point on {device}, and is {log_g.dtype} on {log_g.device}")
    if device.type != "cpu":
        return  # The largest of values that nobody waits for would be a kernel for nothing.
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


def check_state(state: PowerState, q: Tensor, k: Tensor, v: Tensor, p: int, sequences: int, normalize: bool) -> None:
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


def check_packing(cu_seqlens: Tensor, q: Tensor) -> None:
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
