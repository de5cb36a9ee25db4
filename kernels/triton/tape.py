"""What a pass of the kernels does, as a list of steps that run on other tensors of the same layouts (replay.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from powerplan.kernels.triton.entry import Address, Entry, Maps, with_base
from powerplan.kernels.triton.launching import Launch

Optional = tuple[Tensor | None, ...]


class Row:
    """The values of a run, by place: inputs, new tensors, what steps make, and last what is the same every time.

    tensors: all values. taken: the same as a compiled kernel takes them, with addresses in place of tensors.
    """

    __slots__ = ("stream", "taken", "tensors")

    def __init__(self, tensors: list[Any], taken: list[Any], stream: int) -> None:
        self.tensors = tensors
        self.taken = taken
        self.stream = stream

    def put(self, place: int, x: Tensor) -> None:
        """Put a tensor in its place."""
        self.tensors[place] = x
        self.taken[place] = x.data_ptr()


class Start(NamedTuple):
    """Starts a compiled kernel."""

    launch: Launch
    pick: Callable[[Any], tuple[Any, ...]]

    def run(self, row: Row) -> None:
        self.launch.start_on(row.stream, self.pick(row.taken))


class Enter(NamedTuple):
    """Starts a compiled kernel by its function in C: in place of a descriptor its map, sizes and strides are picked."""

    entry: Entry
    programs: int
    pick: Callable[[Any], tuple[Any, ...]]

    def run(self, row: Row) -> None:
        self.entry.start(self.programs, row.stream, self.pick(row.taken))


class Again(NamedTuple):
    """Launches a kernel through the JIT, or in the interpreter."""

    launch: Launch
    pick: Callable[[Any], tuple[Any, ...]]

    def run(self, row: Row) -> None:
        self.launch.again(self.pick(row.tensors))


class Part(NamedTuple):
    """Makes a view of the tensor at a place: sizes, strides, and an offset in elements from where that begins."""

    own: int
    place: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def run(self, row: Row) -> None:
        whole = row.tensors[self.place]
        row.put(self.own, whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset))


class Describe(NamedTuple):
    """Makes the tensor descriptor of what is at a place; descriptor: one for the same layout, without its tensor."""

    own: int
    descriptor: Any
    place: int

    def run(self, row: Row) -> None:
        base = row.tensors[self.place]
        same = with_base(self.descriptor, Address(row.taken[self.place]) if base is None else base)
        row.tensors[self.own] = row.taken[self.own] = same


class Encode(NamedTuple):
    """Puts the tensor map of what is at a place into another one."""

    own: int
    maps: Maps
    place: int

    def run(self, row: Row) -> None:
        row.taken[self.own] = self.maps[row.taken[self.place]]


class At(NamedTuple):
    """Stands for the value at a place in an operator's arguments."""

    place: int


class Operate(NamedTuple):
    """Calls an operator, and puts the tensors that it makes in their places; there are none where it writes to one."""

    own: tuple[int, ...]
    operator: Any
    arguments: list[Any]
    keywords: dict[str, Any]

    def run(self, row: Row) -> None:
        arguments = [_filled(value, row.tensors) for value in self.arguments]
        keywords = {name: _filled(value, row.tensors) for name, value in self.keywords.items()}
        made = self.operator(*arguments, **keywords)
        if self.own:
            for place, x in zip(self.own, (made,) if isinstance(made, Tensor) else made, strict=True):
                row.put(place, x)


def _filled(value: Any, tensors: list[Any]) -> Any:
    if type(value) is At:
        return tensors[value.place]
    return [_filled(each, tensors) for each in value] if type(value) is list else value


Step = Start | Enter | Again | Part | Describe | Encode | Operate


class Temporary(NamedTuple):
    """A tensor that a pass needs for itself: where it begins in the workspace, in bytes.

    layout: Its size, strides and dtype where a step takes the tensor; None where its address is enough.
    """

    offset: int
    layout: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None


class Tape(NamedTuple):
    """What a pass does, on other tensors of the same layouts.

    new: size, strides, dtype and device of each tensor that begins empty and outlives the pass
    workspace: the bytes, dtype (uint8) and device of the one allocation for those that do not; None without any
    temporaries: where these lie in it
    made: how many values steps make
    fixed: constants, numbers, and tensors that outlive calls, in the order of the row's end
    fixed_addresses: the same with addresses in place of tensors
    steps: all else, in its order
    results: the places of what the pass returns
    direct: whether no launch goes through the JIT or the interpreter
    """

    new: tuple[dict[str, Any], ...]
    workspace: dict[str, Any] | None
    temporaries: tuple[Temporary, ...]
    made: int
    fixed: tuple[Any, ...]
    fixed_addresses: tuple[Any, ...]
    steps: tuple[Step, ...]
    results: tuple[int | None, ...]
    direct: bool

    def run(self, inputs: list[Tensor], addresses: tuple[int, ...]) -> Optional:
        """Return what the pass returns for these inputs, which lie at these addresses."""
        new = [torch.empty_strided(**layout) for layout in self.new]
        # Held until all steps have run: some know its address alone, and operators among them take memory that is free.
        workspace = None if self.workspace is None else torch.empty(**self.workspace)
        temporary, temporary_addresses = self._temporaries(workspace)
        to_make = [None] * self.made
        tensors = [*inputs, *new, *temporary, *to_make, *self.fixed]
        taken = [*addresses, *map(Tensor.data_ptr, new), *temporary_addresses, *to_make, *self.fixed_addresses]
        stream = 0
        if self.direct:
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
        row = Row(tensors, taken, stream)
        for step in self.steps:
            step.run(row)
        return tuple([None if place is None else tensors[place] for place in self.results])

    def _temporaries(self, workspace: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
        """Return the temporary tensors, where steps take them, and the addresses of all."""
        if workspace is None:
            return [], []
        base = workspace.data_ptr()
        typed: dict[torch.dtype, Tensor] = {}
        tensors: list[Tensor | None] = []
        for offset, layout in self.temporaries:
            if layout is None:
                tensors.append(None)
                continue
            size, stride, dtype = layout
            whole = typed.get(dtype)
            if whole is None:
                whole = typed[dtype] = workspace.view(dtype)
            tensors.append(whole.as_strided(size, stride, offset // dtype.itemsize))
        return tensors, [base + offset for offset, _ in self.temporaries]
