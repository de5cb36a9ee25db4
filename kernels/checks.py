"""What arguments power attention takes, with the message for each that it does not.

What depends on sizes, dtypes and settings alone is checked once for each combination of them: 10 us a call otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from typing import Any, TypeGuard

import torch
from torch import Tensor

from powerplan.dims import KERNEL_DEGREES, LARGEST_PHI, default_chunk_size, odd_degree, spow_dim
from powerplan.kernels.call import CallShape
from powerplan.kernels.state import PowerState

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that q, k, v and log_g may have."""

LARGEST_CHUNK = 2**31 - 1
"""The most tokens that a chunk may be asked to have: the kernels count them in int32."""

Size = Sequence[int]
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]
Devices = tuple[torch.device, torch.device, torch.device]
CheckSizes = Callable[[Size, Size, Size, Dtypes, Devices, int, bool], None]
MakeShape = Callable[[Size, Size, Size, int, float | None, int | None, bool, str], CallShape]


def check_tensor(name: str, x: object, or_none: bool = False) -> None:
    """Check that x is a tensor with a value for each place; with `or_none`, None is fine too."""
    if not isinstance(x, Tensor):
        if x is None and or_none:
            return
        raise TypeError(f"{name} must be a tensor{' or None' if or_none else ''}, and is {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else x.layout
        raise ValueError(f"{name} must be a dense tensor, and is {kind}")


def check_types(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> None:
    """Raise TypeError for an argument that is no tensor; log_g may be None."""
    check_tensor("q", q)
    check_tensor("k", k)
    check_tensor("v", v)
    check_tensor("log_g", log_g, or_none=True)


def check_flag(name: str, value: bool) -> None:
    """Raise TypeError unless the argument `name` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, and is {shown(value)}")


def check_settings(p: int, scale: float | None, chunk_size: int | None) -> None:
    """Raise ValueError for a degree, a scale or a chunk size, in tokens, that is out of range."""
    if not is_integer(p) or p not in KERNEL_DEGREES:
        raise ValueError(f"p must be 1, 2, 3 or 4, and is {shown(p)}")
    if scale is not None and not _is_finite(scale):
        raise ValueError(f"scale must be a finite number, and is {shown(scale)}")
    if chunk_size is not None and not (is_integer(chunk_size) and 1 <= chunk_size <= LARGEST_CHUNK):
        raise ValueError(f"chunk_size must be an integer of at least 1 and below 2^31, and is {shown(chunk_size)}")


def check_scale(scale: float | None, p: int, dtype: torch.dtype) -> None:
    """Check that scale^p, which multiplies sums of products, is a number that the state's dtype holds, or 0.

    A power that overflows or vanishes there would be an output of NaN, or one of 0, whatever q and k are.
    """
    if scale is None or scale == 0:
        return
    limits = torch.finfo(torch.promote_types(dtype, torch.float32))
    lowest, highest = limits.tiny ** (1 / p), limits.max ** (1 / p)
    if not lowest <= abs(scale) <= highest:
        fits = f"between {lowest:.3g} and {highest:.3g}, or 0, for p={p} in {dtype}"
        raise ValueError(f"the size of scale must be {fits}, and scale is {shown(scale)}")


def check_embedded(head_dim: int, p: int) -> None:
    """Check that phi of K features is of a size that can be listed."""
    entries = spow_dim(head_dim, p)
    if entries > LARGEST_PHI:
        raise ValueError(
            f"phi of {head_dim:,} features has {entries:,} entries for p={p}, and may have {LARGEST_PHI:,}: "
            "use a smaller head dim or degree"
        )


def check_impl(impl: str, allowed: Iterable[str]) -> None:
    """Raise ValueError unless `impl` is "auto" or one of `allowed`."""
    known = ("auto", *allowed)
    if not isinstance(impl, str) or impl not in known:
        raise ValueError(f"impl must be {', '.join(known)}, and is {shown(impl)}")


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
    check_embedded(int(q[3]), p)
    if q[2] % k[2]:
        raise ValueError(f"the {q[2]} heads of q must be a multiple of the {k[2]} heads of k and v")
    check_normalizer(p, normalize)


def check_normalizer(p: int, normalize: bool) -> None:
    """Raise ValueError where a sum of weights of both signs would divide."""
    if normalize and odd_degree(p):
        raise ValueError(
            f"p={p} gives weights of both signs, whose sum may be 0 or negative: use an even p, or normalize=False"
        )


def check_keys_and_values(k: Tensor, v: Tensor, p: int) -> None:
    """Check k and v where there is no q."""
    if k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"k and v must have the dims batch, time, heads, head dim: {list(k.shape)}, {list(v.shape)}")
    if k.dtype not in DTYPES:
        raise TypeError(f"k is {k.dtype}; allowed are {', '.join(str(dtype) for dtype in DTYPES)}")
    if v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"v is {v.dtype} on {v.device}, and k is {k.dtype} on {k.device}; they must agree")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"shapes must be k [B, T, G, K], v [B, T, G, V], and are k {list(k.shape)}, v {list(v.shape)}")
    if 0 in (*k.shape, *v.shape):
        raise ValueError(f"no dim may be 0: k {list(k.shape)}, v {list(v.shape)}")
    check_embedded(int(k.shape[3]), p)


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


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless the argument `name` is an integer of at least `least`."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, and is {shown(value)}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def shown(value: object) -> str:
    """Return a value as a message quotes it: a number or a short text, else its type."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"  # Python refuses to write those of more than 4,300.
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:40]}...")
    if value is None or isinstance(value, (int, float, complex)):
        return repr(value)
    return type(value).__name__


def check_gate(log_g: Tensor, size: Size, device: torch.device) -> None:
    """Check log_g against the sizes of k without the last, [B, T, G] or [B, G], and against k's device."""
    if log_g.shape != size:
        dims = "[B, T, G]" if len(size) == 3 else "[B, G]"
        raise ValueError(f"log_g must be {dims} = {list(size)}, and is {list(log_g.shape)}")
    if log_g.dtype not in DTYPES or log_g.device != device:
        kinds = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"log_g must be {kinds} on {device}, and is {log_g.dtype} on {log_g.device}")
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
    """Raise TypeError or ValueError unless a state is one of so many sequences, for these heads and this degree."""
    if not isinstance(state, PowerState):
        raise TypeError(f"the state must be a PowerState, and is {type(state).__name__}")
    size = [sequences, k.shape[2], spow_dim(int(k.shape[3]), p)]
    dtype = torch.promote_types(q.dtype, torch.float32)
    shapes = {"kv": [*size, v.shape[3]], "key": size}
    for name, shape in shapes.items():
        x = getattr(state, name)
        check_tensor(f"the state's {name}", x, or_none=name == "key")
        if x is None:
            if normalize:
                raise ValueError("the state comes from normalize=False and has no key part, which normalize=True needs")
            continue
        if list(x.shape) != shape:
            raise ValueError(f"the state's {name} must be {shape}, and is {list(x.shape)}{_degree_of(x, k, p)}")
        if x.dtype != dtype or x.device != q.device:
            raise ValueError(f"the state's {name} must be {dtype} on {q.device}, and is {x.dtype} on {x.device}")


def _degree_of(state: Tensor, k: Tensor, p: int) -> str:
    """Return the end of a message where a state has the size of another degree: ", which is one of p=2"."""
    others = (degree for degree in KERNEL_DEGREES if degree != p and state.ndim > 2)
    other = next((degree for degree in others if spow_dim(int(k.shape[3]), degree) == state.shape[2]), None)
    return "" if other is None else f", which is one of p={other}"


def check_packing(cu_seqlens: Tensor, q: Tensor, name: str = "q") -> None:
    """Check cu_seqlens against the tensor `q` of this name, [B, T, ...]."""
    check_tensor("cu_seqlens", cu_seqlens)
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences in one batch row, and {name} has {q.shape[0]} rows")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        kind = f"{cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens must be at least 2 integers in one dim, int32 or int64, and is {kind}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens must be on {q.device} as {name} is, and is on {cu_seqlens.device}")
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
        raise ValueError(f"cu_seqlens must rise from 0 to {q.shape[1]}, the length of {name}, and {fault}")
