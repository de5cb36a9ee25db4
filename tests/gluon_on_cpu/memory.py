"""Memory of an emulated Hopper GPU that programs share or copy to: what is under way, and who may touch it when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import SharedLinearLayout

from gluon_on_cpu.program import Int, convert_layout, running, settled


class Shared:
    """Shared memory, or a view of it.

    `view` is over the memory; its shape is `shape`, or finer where another layout splits dims into bits.
    """

    def __init__(self, view: Tensor, shape: Sequence[int], layout: Any) -> None:
        self.view, self.shape, self.layout, self.dtype = view, [int(x) for x in shape], layout, view.dtype
        size, first = view.element_size(), view.storage_offset()
        last = first + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
        self.memory, self.bytes = view.untyped_storage().data_ptr(), (first * size, (last + 1) * size)

    def index(self, i: Any) -> Shared:
        if not 0 <= int(i) < self.shape[0]:
            raise IndexError(f"index {int(i)} of {self.shape[0]} in shared memory")
        return Shared(self._plain()[int(i)], self.shape[1:], self.layout)

    def slice(self, start: Any, length: Any, dim: Any = 0) -> Shared:
        part = self._plain().narrow(int(dim), int(start), int(length))
        return Shared(part, part.shape, self.layout)

    def permute(self, order: Sequence[Any]) -> Shared:
        turned = self._plain().permute([int(x) for x in order])
        return Shared(turned, turned.shape, self.layout)

    def reshape(self, shape: Sequence[Any]) -> Shared:
        made = self._plain().view([int(x) for x in shape])
        return Shared(made, made.shape, self.layout)

    def load(self, layout: Any = None) -> Tensor:
        self.check_readable("load")
        found = self.view.clone().reshape(self.shape)
        return convert_layout(found, layout)

    def store(self, value: Tensor) -> None:
        settled(value)
        if list(value.shape) != self.shape:
            raise ValueError(f"store of {list(value.shape)} to shared memory of {self.shape}")
        self.check_free("store")
        self.view.copy_(value.reshape(self.view.shape))
        running().unfenced.append(self)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[Any], layout: Any) -> Shared:
        flat = self._plain().reshape(-1).view(dtype) if self.view.is_contiguous() else None
        sizes = [int(x) for x in shape]
        if flat is None or flat.untyped_storage().data_ptr() != self.memory:
            raise NotImplementedError("another view of shared memory that is not contiguous")
        if isinstance(layout, SharedLinearLayout):
            return Shared(_by_bits(flat, sizes, layout), sizes, layout)
        if layout != self.layout and (_swizzled(layout) or _swizzled(self.layout)):
            raise NotImplementedError(f"view of {self.layout} as {layout}: the emulated memory has no swizzle")
        return Shared(flat.view(sizes), sizes, layout)

    def _keep_alive(self) -> None:
        pass

    def _plain(self) -> Tensor:
        if list(self.view.shape) != self.shape:
            raise NotImplementedError("part of shared memory in a linear layout")
        return self.view

    def touches(self, other: Shared) -> bool:
        """Return whether the two have bytes in common."""
        apart = self.bytes[1] <= other.bytes[0] or other.bytes[1] <= self.bytes[0]
        if self.memory != other.memory or apart:
            return False
        if self.dtype != other.dtype or (self.view.is_contiguous() and other.view.is_contiguous()):
            return True
        marks = torch.zeros(self.view.untyped_storage().nbytes() // self.view.element_size(), dtype=torch.bool)
        marks.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        return bool(marks.as_strided(other.view.shape, other.view.stride(), other.view.storage_offset()).any())

    def check_readable(self, what: str) -> None:
        if any(x.target.touches(self) for x in running().copies):
            raise RuntimeError(f"{what} of shared memory before the wait for the copy that fills it")

    def check_visible(self, what: str) -> None:
        """Raise where products and copies, which see shared memory apart from threads, would not see all stores."""
        self.check_readable(what)
        if any(x.touches(self) for x in running().unfenced):
            raise RuntimeError(f"{what} of shared memory that was stored to: fence_async_shared() is missing")

    def check_free(self, what: str) -> None:
        here = running()
        for x in here.products:
            if any(isinstance(part, Shared) and part.touches(self) for part in (x.left, x.right)):
                raise RuntimeError(f"{what} to shared memory that the product in line {x.line} may still read")
        if any(x.target.touches(self) for x in here.copies):
            raise RuntimeError(f"{what} to shared memory that a copy under way fills")
        if any(x.touches(self) for x in here.stores):
            raise RuntimeError(f"{what} to shared memory that a store under way may still read")


def _swizzled(layout: Any) -> bool:
    order = list(getattr(layout, "order", ()))
    turned = order != sorted(order, reverse=True)
    return turned or getattr(layout, "max_phase", 1) > 1 or getattr(layout, "swizzle_byte_width", 0) > 0


def _by_bits(flat: Tensor, shape: list[int], layout: SharedLinearLayout) -> Tensor:
    """Return memory seen through a layout that sends each bit of an offset to one bit of one coordinate."""
    bases = [[int(x) for x in base] for base in layout.offset_bases]
    where = {(dim, x): i for i, base in enumerate(bases) for dim, x in enumerate(base) if x}
    wanted = [(dim, 1 << bit) for dim, size in enumerate(shape) for bit in reversed(range(size.bit_length() - 1))]
    if sorted(where) != sorted(wanted) or 1 << len(bases) != flat.numel():
        raise NotImplementedError(f"view of {flat.numel()} elements as {shape} through {layout}")
    return flat.view([2] * len(bases)).permute([len(bases) - 1 - where[key] for key in wanted])


def allocate(dtype: torch.dtype, shape: Sequence[Any], layout: Any = None, value: Tensor | None = None) -> Shared:
    sizes = [int(x) for x in shape]
    made = Shared(torch.full(sizes, float("nan") if dtype.is_floating_point else -1, dtype=dtype), sizes, layout)
    if value is not None:
        made.store(value)
    return made


class Descriptor:
    """A tensor that copies read or write in blocks: a triton TensorDescriptor, seen from a kernel."""

    def __init__(self, host: Any) -> None:
        self.shape, self.strides = [Int(x) for x in host.shape], [Int(x) for x in host.strides]
        self.block_shape, self.layout, self.dtype = [int(x) for x in host.block_shape], host.layout, host.base.dtype
        self.base = host.base.as_strided(tuple(host.shape), tuple(host.strides))
        self.outside = float("nan") if getattr(host, "padding", "zero") == "nan" else 0
        self.nbytes = self.base.new_empty(self.block_shape, device="meta").nbytes
        self.block_type = SimpleNamespace(
            shape=[Int(x) for x in self.block_shape], nbytes=Int(self.nbytes), element_ty=self.dtype
        )

    def parts(self, coord: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return the part of the tensor that a block at `coord` covers, and the part of the block."""
        low = [int(x) for x in coord]
        if low[-1] * self.base.element_size() % 16:
            raise ValueError(f"block at {low}: the last coordinate must be a multiple of 16 bytes")
        ends = [max(0, min(size, x + n)) for x, n, size in zip(low, self.block_shape, self.base.shape, strict=True)]
        begins = [min(max(0, x), end) for x, end in zip(low, ends, strict=True)]
        inside = [slice(b - x, e - x) if e > b else slice(0) for x, b, e in zip(low, begins, ends, strict=True)]
        return tuple(map(slice, begins, ends)), tuple(inside)


@dataclass(eq=False)
class Barrier:
    """An mbarrier: phase n is complete when all arrivals are in and all bytes expected have been copied."""

    count: int
    phase: int = 0
    arrived: int = 0
    expected: int = 0
    copied: int = 0


@dataclass(eq=False)
class Copy:
    target: Shared
    data: Tensor
    barrier: Barrier


def _barrier(bar: Shared) -> Barrier:
    found = running().barriers.get((bar.memory, bar.bytes[0]))
    if found is None:
        raise RuntimeError("a barrier is used before mbarrier.init")
    return found


def _init(bar: Shared, count: Any = 1) -> None:
    running().barriers[bar.memory, bar.bytes[0]] = Barrier(int(count))


def _arrive(bar: Shared, *, count: Any = 1, pred: Any = True, size: int = 0) -> None:
    if not pred:
        return
    state = _barrier(bar)
    if state.arrived + int(count) > state.count:
        raise RuntimeError(f"an arrival too many in phase {state.phase} of a barrier, which nobody has waited for")
    state.arrived += int(count)
    state.expected += size


def _expect(bar: Shared, size: Any, pred: Any = True) -> None:
    _arrive(bar, pred=pred, size=int(size))


def _wait(bar: Shared, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if not pred:
        return
    state, parity = _barrier(bar), int(phase)
    begun = state.arrived or state.expected or state.copied
    if parity not in (0, 1):
        raise ValueError(f"wait for phase {parity}: it takes the parity, 0 or 1")
    if state.phase % 2 != parity:
        if begun:
            raise RuntimeError(f"wait for parity {parity} passes at once: phase {state.phase} is under way")
        return
    if state.arrived < state.count or state.copied != state.expected:
        raise RuntimeError(
            f"wait for phase {state.phase} never ends: {state.arrived} of {state.count} arrivals, "
            f"{state.copied} of {state.expected} bytes"
        )
    here = running()
    for x in [x for x in here.copies if x.barrier is state]:
        x.target.view.copy_(x.data.reshape(x.target.view.shape))
        here.copies.remove(x)
    state.phase, state.arrived, state.expected, state.copied = state.phase + 1, 0, 0, 0


class BarrierLayout:
    """Stands for mbarrier.MBarrierLayout."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


BARRIERS = SimpleNamespace(
    init=_init, expect=_expect, wait=_wait, arrive=_arrive, invalidate=lambda bar: None, MBarrierLayout=BarrierLayout
)


def copy_to_shared(
    desc: Descriptor, coord: Sequence[Any], barrier: Shared, result: Shared, pred: Any = True, **_: Any
) -> None:
    if not pred:
        return
    if result.shape != desc.block_shape or result.dtype != desc.dtype:
        raise ValueError(f"copy of {desc.block_shape} {desc.dtype} to shared memory of {result.shape} {result.dtype}")
    result.check_free("copy")
    outer, inner = desc.parts(coord)
    data = torch.full(desc.block_shape, desc.outside, dtype=desc.dtype)
    data[inner] = desc.base[outer]
    state = _barrier(barrier)
    state.copied += desc.nbytes
    result.view.fill_(float("nan") if desc.dtype.is_floating_point else -1)
    running().copies.append(Copy(result, data, state))


def copy_to_global(desc: Descriptor, coord: Sequence[Any], src: Shared, **_: Any) -> None:
    src.check_visible("copy")
    outer, inner = desc.parts(coord)
    desc.base[outer] = src.load()[inner]
    running().stores.append(src)


def fence(cluster: Any = False) -> None:
    running().unfenced.clear()


def wait_for_stores(pendings: Any = 0, **_: Any) -> None:
    stores = running().stores
    del stores[: max(0, len(stores) - int(pendings))]
