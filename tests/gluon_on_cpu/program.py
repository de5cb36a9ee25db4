"""One program of an emulated kernel: its scalars, its loops, its global memory, and the operands of its products."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import DotOperandLayout

HERE = str(Path(__file__).parent)

_programs: list[Any] = []


class Int(int):
    """A scalar of a kernel: an int that takes .to(dtype). Division is the GPU's: a negative dividend raises."""

    @property
    def value(self) -> int:
        return int(self)

    def to(self, dtype: torch.dtype) -> Any:
        return torch.tensor(int(self), dtype=dtype) if dtype.is_floating_point else self

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __invert__(self) -> Any:
        raise NotImplementedError("~ of a scalar: write `not`, which is right for booleans on a GPU and here")


def _scalar_method(name: str) -> Any:
    plain = getattr(int, name)

    def method(self: int, *args: Any) -> Any:
        if name in ("__floordiv__", "__mod__") and isinstance(args[0], int) and (self < 0 or args[0] < 0):
            raise ArithmeticError(f"{int(self)} divided by {args[0]}: a GPU rounds to zero, Python down")
        found = plain(self, *args)
        return Int(found) if isinstance(found, int) else found

    return method


NAMES = (
    "lt le gt ge eq ne add sub mul floordiv mod and or xor lshift rshift neg radd rsub rmul rand ror".split()  # noqa: SIM905
)
for _name in NAMES:
    setattr(Int, f"__{_name}__", _scalar_method(f"__{_name}__"))


def constexpr(value: Any) -> Any:
    return Int(value) if type(value) in (int, bool) else value


@dataclass
class Program:
    """One program of a launch, and what it has under way."""

    index: tuple[int, int, int]
    grid: tuple[int, ...]
    warps: int
    operands: bool
    double: bool
    products: list[Any] = field(default_factory=list)
    copies: list[Any] = field(default_factory=list)
    stores: list[Any] = field(default_factory=list)
    unfenced: list[Any] = field(default_factory=list)  # shared memory that threads stored to since the last fence
    barriers: dict[tuple[int, int], Any] = field(default_factory=dict)
    loops: list[tuple[object, int]] = field(default_factory=list)  # each loop at run time, and its iteration
    unrolled: list[int] = field(default_factory=list)

    def finish(self) -> None:
        if self.copies:
            raise RuntimeError(f"the program ends while {len(self.copies)} copies are under way: nobody waits for them")
        if self.stores:
            raise RuntimeError("the program ends while a store is under way: store_wait(0) is missing")


@contextmanager
def program(
    index: tuple[int, int, int], grid: tuple[int, ...], warps: int = 4, operands: bool = True, double: bool = False
) -> Iterator[Program]:
    _programs.append(Program(index, grid, warps, operands, double))
    try:
        yield _programs[-1]
    finally:
        _programs.pop()


def running() -> Program:
    if not _programs:
        raise RuntimeError("this belongs into a kernel that is launched")
    return _programs[-1]


def run_range(*bounds: Any, **_: Any) -> Iterator[Int]:
    """A loop at run time: every iteration uses the same registers."""
    values = builtins.range(*(int(x) for x in bounds))
    if not _programs:
        yield from map(Int, values)
        return
    here, loop, depth = running(), object(), len(running().loops)
    for n, value in enumerate(values):
        here.loops.append((loop, n))
        yield Int(value)
        del here.loops[depth:]
        for x in here.products:
            if x.made is not None and here.operands and _iteration(x.path, loop) != _iteration(x.made.path, loop) != -1:
                raise RuntimeError(
                    f"the left operand of the product in line {x.line} was made in the iteration before, and the "
                    "registers of what an iteration hands to the next are written here: wait for the product before"
                )


def _iteration(path: tuple[tuple[object, int], ...], loop: object) -> int:
    return next((n for other, n in path if other is loop), -1)


def static_range(*bounds: Any, **_: Any) -> Iterator[Int]:
    """A loop that the compiler unrolls: every iteration has registers of its own."""
    unrolled = running().unrolled
    depth = len(unrolled)
    for value in builtins.range(*(int(x) for x in bounds)):
        unrolled.append(value)
        yield Int(value)
        del unrolled[depth:]


@dataclass(frozen=True)
class Made:
    """Where a left operand was made: the place in the unrolled code, and the iterations of loops at run time."""

    site: tuple[Any, ...]
    path: tuple[tuple[object, int], ...]


class Pending:
    """The accumulator of a product that has not been waited for."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape, self.value, self.taken = list(shape), None, False
        self.value: Tensor | None

    def use(self) -> Pending:
        if self.taken:
            raise RuntimeError("an accumulator that another product goes on with is used again")
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls._early()

    @staticmethod
    def _early(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the result of a product is used before a warpgroup_mma_wait that covers it and names it")


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "getitem", "gt", "lt"):
    setattr(Pending, f"__{_name}__", Pending._early)
for _name in ("to", "sum", "reshape"):
    setattr(Pending, _name, Pending._early)


def settled(value: Any) -> None:
    """Raise for the result of a product that has not been waited for."""
    if isinstance(value, Pending):
        Pending._early()


def site() -> tuple[tuple[Any, ...], int]:
    """Return the place in the kernel, with the steps of unrolled loops, and its line."""
    frame = sys._getframe(1)
    places = []
    while frame is not None:
        if not frame.f_code.co_filename.startswith(HERE):
            places.append((frame.f_code, frame.f_lasti, frame.f_lineno))
        elif frame.f_code.co_name == "launch":
            break
        frame = frame.f_back  # type: ignore[assignment]
    return (tuple(places), tuple(running().unrolled)), places[0][2]


def convert_layout(x: Any, layout: Any = None, assert_trivial: bool = False) -> Any:
    """Return x; where it becomes a left operand, in registers that no outstanding product may still read."""
    settled(x)
    if not (isinstance(layout, DotOperandLayout) and layout.operand_index == 0):
        return x
    here = running()
    place, _ = site()
    found = x.view_as(x)
    found.made = Made(place, tuple(here.loops))
    written(place, found)
    return found


def written(place: tuple[Any, ...], operand: Any) -> None:
    """Raise where an outstanding product reads the registers that an operand made here is written to."""
    here = running()
    for x in here.products if here.operands else ():
        if x.made is None or x.made.site != place or x.left is operand:
            continue
        if x.path == x.made.path:
            raise RuntimeError(
                f"the left operand of the product in line {x.line} is made again while the product may still read its "
                "registers: wait before, or unroll the loop with static_range so that iterations have registers of "
                "their own"
            )
        x.remade = True


class Pointer:
    """Elements of a tensor from its first on; `offset` is an integer or a tensor of them."""

    def __init__(self, flat: Tensor, offset: Any) -> None:
        self.flat, self.offset = flat, offset
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    @staticmethod
    def to(x: Tensor) -> Pointer:
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        return Pointer(x.as_strided((reach if x.numel() else 0,), (1,)), 0)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.flat, self.offset + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.flat, self.offset - other)

    def places(self, mask: Any, verb: str) -> tuple[Tensor, Tensor]:
        """Return the offsets, 0 where the mask is off, and the mask. Raises IndexError where it is on out of range."""
        offset = torch.as_tensor(self.offset).long()
        on = torch.as_tensor(True if mask is None else mask).bool()
        offset, on = torch.broadcast_tensors(offset, on)
        offset = torch.where(on, offset, 0)
        if on.any():
            low, high = int(offset.min()), int(offset.max())
            if low < 0 or high >= self.flat.numel():
                raise IndexError(f"{verb} elements {low} to {high} of a tensor of {self.flat.numel()}")
        return offset, on


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Any:
    offset, on = pointer.places(mask, "load of")
    if mask is None:
        found = pointer.flat[offset]
    else:
        # What a mask leaves out has no value unless one is given.
        hole = other if other is not None else float("nan") if pointer.flat.is_floating_point() else 0x5A5A5A5A
        values = pointer.flat[offset] if pointer.flat.numel() else torch.zeros(offset.shape, dtype=pointer.flat.dtype)
        found = torch.where(on, values, torch.as_tensor(hole, dtype=values.dtype))
    return Int(found) if found.dim() == 0 and not found.is_floating_point() else found


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    settled(value)
    offset, on = pointer.places(mask, "store to")
    value, offset, on = torch.broadcast_tensors(torch.as_tensor(value).to(pointer.flat.dtype), offset, on)
    pointer.flat[offset[on]] = value[on]
