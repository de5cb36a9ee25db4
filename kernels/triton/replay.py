"""A pass of the kernels, repeated without the Python that laid it out.

For tensors of the same sizes, strides and dtypes a pass is a list of allocations and launches that differs in addresses
only. The second call of its kind is watched and written to a `Tape`, and from the third on the tape runs, in a fraction
of the time (benchmarks/host_time.py).

A pass is written down only where it consists of new tensors, views and launches. Any other operator (a copy of a
strided input, the table of packed sequences, the conversion of a state), and it is laid out anew every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import attrgetter, or_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from powerplan.kernels.triton.launching import ALIGNMENT, Launch, is_descriptor, is_listened_to, listening, picker

MOST_ATTEMPTS = 3
"""Calls of one kind that are watched in vain before nobody watches them any more."""

MOST_KINDS = 64
"""Kinds of calls of one shape that are remembered: they differ in strides and dtypes."""

_EMPTY = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided)
_ZEROS = (torch.ops.aten.zeros, torch.ops.aten.zeros_like, torch.ops.aten.new_zeros)

_dtype = attrgetter("dtype")

Optional = tuple[Tensor | None, ...]
Tapes = dict[Any, "Tape | int"]
"""By the kind of a call, its tape, or how many calls ran without one."""


def repeat(tapes: Tapes, name: Any, tensors: Optional, lay_out: Callable[[], Optional]) -> Optional:
    """Return what lay_out() returns, by a tape where there is one.

    Args:
        tapes: The tapes of calls of one shape on one device.
        name: What the pass is, and its settings beside the shape.
        tensors: All tensors that lay_out reads and that differ from call to call.
        lay_out: Runs the pass. What it launches follows from the arguments before it, and not from the tensors' values.
    """
    given = [x for x in tensors if x is not None]
    addresses = tuple(map(Tensor.data_ptr, given))
    if reduce(or_, addresses) % ALIGNMENT or is_listened_to():
        return lay_out()
    kind = (
        name,
        tuple([x is None for x in tensors]),
        tuple(map(Tensor.stride, given)),
        tuple(map(_dtype, given)),
    )
    tape = tapes.get(kind, 0)
    if isinstance(tape, Tape):
        return tape.run(given, addresses)
    if tape == 0:  # The first call fills caches, which is none of a pass's own work.
        if len(tapes) < MOST_KINDS:
            tapes[kind] = 1
        return lay_out()
    if tape > MOST_ATTEMPTS:
        return lay_out()
    watch = Watch(given)
    with listening(watch), watch:
        returned = lay_out()
    tapes[kind] = watch.tape(returned) or tape + 1
    return returned


@dataclass(frozen=True)
class Tape:
    """The allocations and launches of a pass.

    What launches take stands in one row, by whose places they name it: the inputs, the new tensors, tensor descriptors,
    and what is the same every time.

    Attributes:
        new: Size, strides, dtype and device of each new tensor, and whether it starts as zeros.
        descriptors: Tensor descriptors, each with the place of the tensor that it describes.
        fixed: Constants, numbers, and tensors that outlive calls.
        launches: The launches, each with what picks its arguments from the row.
        results: The places of what the pass returns.
        direct: Whether all launches start compiled kernels, which take addresses. Else they go through the JIT or the
            interpreter, which take tensors.
    """

    new: tuple[tuple[dict[str, Any], bool], ...]
    descriptors: tuple[tuple[Any, int], ...]
    fixed: tuple[Any, ...]
    launches: tuple[tuple[Launch, Callable[[Any], tuple[Any, ...]]], ...]
    results: tuple[int | None, ...]
    direct: bool

    @cached_property
    def fixed_addresses(self) -> tuple[Any, ...]:
        """What is the same every time, with addresses of tensors."""
        return tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in self.fixed)

    def run(self, inputs: list[Tensor], addresses: tuple[int, ...]) -> Optional:
        """Return what the pass returns for these inputs, which lie at these addresses."""
        made = []
        for layout, is_zero in self.new:
            x = torch.empty_strided(**layout)
            made.append(x.zero_() if is_zero else x)
        row = (*inputs, *made, *self.fixed)
        described = [_describing(descriptor, row[place]) for descriptor, place in self.descriptors]
        if self.direct:
            taken = (*addresses, *map(Tensor.data_ptr, made), *self.fixed_addresses, *described)
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
            for launch, pick in self.launches:
                launch.start_on(stream, pick(taken))
        else:
            for launch, pick in self.launches:
                launch.again(pick((*row, *described)))
        return tuple([None if place is None else row[place] for place in self.results])


def _describing(descriptor: Any, tensor: Tensor) -> Any:
    """Return the descriptor of another tensor of the same layout. A new one would check the layout again: 5 us."""
    same = object.__new__(type(descriptor))
    same.__dict__.update(descriptor.__dict__)
    same.base = tensor
    return same


class Watch(TorchDispatchMode):
    """Sees the operators of a pass, and keeps what a tape needs.

    Attributes:
        inputs: The tensors that the pass reads.
        new: The tensors that it made, and whether as zeros. They are held, so that no two have one address.
        launches: Its launches.
        possible: Whether all else that it did was to view tensors.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.inputs = inputs
        self.new: list[tuple[Tensor, bool]] = []
        self.launches: list[Launch] = []
        self.possible = True
        self.is_launching = False

    def begins(self) -> None:
        """A launch begins, in which the interpreter uses operators of its own."""
        self.is_launching = True

    def ends(self, launched: Launch) -> None:
        """Keep a launch."""
        self.is_launching = False
        self.launches.append(launched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_launching:
            return result
        if func.overloadpacket in _EMPTY + _ZEROS:
            self.new.append((result, func.overloadpacket in _ZEROS))
        else:
            # The schema of some operators calls a view what may be a copy.
            self.possible &= func.is_view and isinstance(result, Tensor) and _storage(result) == _storage(args[0])
        return result

    def tape(self, returned: Optional) -> Tape | None:
        """Return the tape of a pass that returned this, or None where it did more than a tape can."""
        if not self.possible or not self.launches:
            return None
        try:
            return _Row(self.inputs, self.new).tape(self.launches, returned)
        except _NoTapeError:
            return None


class _NoTapeError(Exception):
    """A pass does something that a tape cannot repeat."""


class _Row:
    """The row of a tape while it is written."""

    def __init__(self, inputs: list[Tensor], new: list[tuple[Tensor, bool]]) -> None:
        self.tensors = [*inputs, *(x for x, _ in new)]
        self.first_new = len(inputs)
        self.layouts = [(_layout(x), is_zero) for x, is_zero in new]
        self.places = {x.data_ptr(): place for place, x in enumerate(self.tensors) if x.numel()}
        if len(self.places) < sum(bool(x.numel()) for x in self.tensors):
            raise _NoTapeError  # Two inputs at one address: their uses cannot be told apart.
        self.storages = {_storage(x) for x in self.tensors if x.numel()}
        self.fixed: list[Any] = []
        self.descriptors: list[tuple[Any, int]] = []

    def place(self, value: Any) -> int:
        """Return the place of what a launch takes. Those of descriptors follow the row, and are negative here."""
        if is_descriptor(value):
            self.descriptors.append((value, self.place(value.base)))
            return -len(self.descriptors)
        if isinstance(value, Tensor):
            if not value.numel():
                found = [place for place, x in enumerate(self.tensors) if x is value]
                if not found:
                    raise _NoTapeError
                return found[0]
            place = self.places.get(value.data_ptr())
            if place is not None and value.dtype == self.tensors[place].dtype:
                return place
            if _storage(value) in self.storages:
                raise _NoTapeError  # a part of a tensor, or a view of another dtype
        self.fixed.append(value)
        return len(self.tensors) + len(self.fixed) - 1

    def result(self, x: Tensor | None) -> int | None:
        """Return the place of what the pass returns. A new tensor is made in the shape that it is returned in."""
        if x is None:
            return None
        place = self.place(x)
        index = place - self.first_new
        if 0 <= index < len(self.layouts):
            whole = self.tensors[place]
            if x.numel() != whole.numel() or not (x.is_contiguous() and whole.is_contiguous()):
                raise _NoTapeError
            self.layouts[index] = _layout(x), self.layouts[index][1]
        return place

    def tape(self, launches: list[Launch], returned: Optional) -> Tape:
        picks = [[self.place(value) for value in launch.arguments] for launch in launches]
        results = tuple(self.result(x) for x in returned)
        wanted = [place for place in results if place is not None]
        if len(set(wanted)) < len(wanted):
            raise _NoTapeError  # One new tensor returned in two shapes.
        end = len(self.tensors) + len(self.fixed)
        pickers = [picker([place if place >= 0 else end - place - 1 for place in pick]) for pick in picks]
        kept = [launch._replace(arguments=()) for launch in launches]
        return Tape(
            new=tuple(self.layouts),
            descriptors=tuple(self.descriptors),
            fixed=tuple(self.fixed),
            launches=tuple(zip(kept, pickers, strict=True)),
            results=results,
            direct=all(launch.start is not None for launch in launches),
        )


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _layout(x: Tensor) -> dict[str, Any]:
    return {"size": x.shape, "stride": x.stride(), "dtype": x.dtype, "device": x.device}
