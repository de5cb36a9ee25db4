"""A pass of the kernels, repeated without the Python that laid it out.

For tensors of the same sizes, strides and dtypes a pass is a list of allocations, operators and launches that differs
in addresses only. The second call of its kind is watched and written to a `Tape`, and from the third on the tape runs,
in a fraction of the time (benchmarks/host_time.py). Operators are repeated as they were called, and cost what they
cost; a pass of nothing but new tensors and launches is the fastest.

Nothing is written down where an operator gives a value to Python, or a tensor whose size depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import attrgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from powerplan.kernels.triton.entry import Entry, Maps, entry_of, with_base
from powerplan.kernels.triton.launching import ALIGNMENT, Launch, is_descriptor, is_listened_to, listening, picker
from powerplan.kernels.triton.tape import (
    Again,
    At,
    Describe,
    Encode,
    Enter,
    Operate,
    Optional,
    Part,
    Start,
    Step,
    Tape,
    Temporary,
)
from powerplan.kernels.triton.workspace import Use, packed

MOST_ATTEMPTS = 3
"""Calls of one kind that are watched in vain before nobody watches them any more."""

MOST_KINDS = 64
"""Kinds of calls of one shape that are remembered: they differ in strides and dtypes."""

_EMPTY = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided)

_dtype = attrgetter("dtype")

Tapes = dict[Any, "Tape | int"]
"""By the kind of a call, its tape, or how many calls ran without one."""


def repeat(tapes: Tapes, name: Any, tensors: Optional, lay_out: Callable[[], Optional]) -> Optional:
    """Return what lay_out() returns, by a tape where there is one.

    Args:
        tapes: The tapes of calls of one shape on one device.
        name: What the pass is, and its settings beside the shape.
        tensors: All tensors that lay_out reads and that differ from call to call.
        lay_out: Runs the pass. What it does follows from the arguments before it, and not from the tensors' values.
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
    watch = Watch()
    with listening(watch), watch:
        returned = lay_out()
    try:
        tapes[kind] = _Writer(given, watch, returned).tape()
    except _NoTapeError:
        tapes[kind] = tape + 1
    return returned


class Call(NamedTuple):
    """A call of an operator."""

    operator: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any

    @property
    def is_empty(self) -> bool:
        """Whether it made a tensor that nobody has written to."""
        return self.operator.overloadpacket in _EMPTY


class Watch(TorchDispatchMode):
    """Keeps the operators and the launches of a pass, in their order.

    Attributes:
        events: They hold all tensors, so that no two have one address.
        is_launching: Whether a launch has begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Launch | Call] = []
        self.is_launching = False

    def begins(self) -> None:
        """A launch begins, in which the interpreter uses operators of its own."""
        self.is_launching = True

    def ends(self, launched: Launch) -> None:
        """Keep a launch."""
        self.is_launching = False
        self.events.append(launched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.is_launching:
            self.events.append(Call(func, args, kwargs or {}, result))
        return result


class _NoTapeError(Exception):
    """A pass does something that a tape cannot repeat."""


class _Writer:
    """Writes the tape of a pass that was watched.

    Every tensor of the pass lies in the memory of an input, of a tensor that an operator made, or of one that outlives
    the pass. That one is its root: it has a place, and the storage tells it.
    """

    def __init__(self, inputs: list[Tensor], watch: Watch, returned: Optional) -> None:
        self.events = watch.events
        # All or none: a tape that launches through the JIT anywhere asks for no stream.
        self.direct = all(event.start is not None for event in self.events if isinstance(event, Launch))
        self.returned = returned
        new = [event.result for event in self.events if isinstance(event, Call) and event.is_empty]
        outlive = {_storage(x) for x in returned if x is not None and x.numel()}
        device = inputs[0].device
        kept = [
            x
            for x in new
            if any(x is each for each in returned) or (x.numel() and (_storage(x) in outlive or x.device != device))
        ]
        self.temporary = [x for x in new if x.numel() and not any(x is each for each in kept)]
        self.roots: list[Tensor] = [*inputs, *kept, *self.temporary]
        self.inputs = len(inputs)
        self.first_temporary = self.inputs + len(kept)
        self.first_made = len(self.roots)
        self.layouts = [_layout(x) for x in kept]
        self.now = 0  # the event that is being written down
        self.used: dict[int, list[int]] = {}  # by the place of a temporary tensor, the events that use it
        self.taken: set[int] = set()  # places of temporary tensors that steps take, and not their addresses alone
        self.places: dict[int, list[int]] = {}
        for place, x in enumerate(self.roots):
            if x.numel():
                self.places.setdefault(_storage(x), []).append(place)
        self.fixed: list[Any] = []
        self.steps: list[Step] = []
        self.whole: set[int] = set()  # places whose sizes and strides count

    def tape(self) -> Tape:
        for index, event in enumerate(self.events):
            self.now = index
            if isinstance(event, Launch):
                self.launch(event)
            elif not event.is_empty:
                self.operate(event)
        results = tuple([None if x is None else self.result(x) for x in self.returned])
        self.fixed.reverse()
        workspace, temporaries = self.workspace()
        return Tape(
            new=tuple(self.layouts),
            workspace=workspace,
            temporaries=temporaries,
            made=len(self.roots) - self.first_made,
            fixed=tuple(self.fixed),
            fixed_addresses=tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in self.fixed),
            steps=tuple(self.steps),
            results=results,
            direct=self.direct,
        )

    def workspace(self) -> tuple[dict[str, Any] | None, tuple[Temporary, ...]]:
        """Return the allocation that holds the temporary tensors, and where they lie in it."""
        if not self.temporary:
            return None, ()
        places = range(self.first_temporary, self.first_made)
        uses = []
        for place, x in zip(places, self.temporary, strict=True):
            used = self.used.get(place)
            uses.append(Use(used[0], used[-1], _span(x) * x.itemsize) if used else Use(0, 0, 0))
        offsets, total = packed(uses)
        layouts = [
            (tuple(x.shape), x.stride(), x.dtype) if place in self.taken or not self.direct else None
            for place, x in zip(places, self.temporary, strict=True)
        ]
        whole = {"size": (total,), "dtype": torch.uint8, "device": self.temporary[0].device}
        return whole, tuple(map(Temporary, offsets, layouts))

    def keep(self, value: Any) -> int:
        """Return the place of what is the same every time: from the end of the row."""
        self.fixed.append(value)
        return -len(self.fixed)

    def own(self, value: Any) -> int:
        """Return a new place, for what a step makes."""
        self.roots.append(value)
        return len(self.roots) - 1

    def root(self, x: Tensor) -> int | None:
        """Return the place of a tensor's root, or None where it outlives the pass."""
        found = self.places.get(_storage(x), [])
        if len(found) > 1:  # Inputs that are views of one tensor: the one that begins where this does.
            found = [place for place in found if self.roots[place].data_ptr() == x.data_ptr()]
            if len(found) != 1:
                raise _NoTapeError
        if found and self.roots[found[0]].dtype != x.dtype:
            raise _NoTapeError
        return found[0] if found else None

    def place(self, value: Any, whole: bool = False) -> int:
        """Return the place of a value.

        whole: Whether its sizes and strides count. A launch takes an address alone.
        """
        if is_descriptor(value):
            base = self.place(value.base)
            own = self.own(None)
            self.steps.append(Describe(own, with_base(value, None), base))
            return own
        place = self.root(value) if isinstance(value, Tensor) and value.numel() else None
        if place is None:
            return self.keep(value)
        root = self.roots[place]
        self.used.setdefault(place, []).append(self.now)
        offset = value.storage_offset() - root.storage_offset()
        if whole or offset:
            self.taken.add(place)
        if offset or (whole and (value.shape != root.shape or value.stride() != root.stride())):
            own = self.own(None)
            self.steps.append(Part(own, place, tuple(value.shape), value.stride(), offset))
            return own
        if whole:
            self.whole.add(place)
        return place

    def launch(self, launch: Launch) -> None:
        """Write steps for a launch."""
        entry = entry_of(launch.start.kernel) if self.direct and launch.start is not None else None
        if entry is not None and len(entry.expand) == sum(map(is_descriptor, launch.arguments)):
            self.steps.append(Enter(entry, launch.programs, picker(self.expanded(launch.arguments, entry))))
            return
        pick = picker([self.place(value) for value in launch.arguments])
        kept = launch._replace(arguments=())
        self.steps.append(Start(kept, pick) if self.direct else Again(kept, pick))

    def expanded(self, values: tuple[Any, ...], entry: Entry) -> list[int]:
        """Return the places of what a compiled kernel takes, with the steps that encode tensor maps written."""
        places = []
        expand = iter(entry.expand)
        for value in values:
            if not is_descriptor(value):
                places.append(self.place(value))
                continue
            maps = Maps(value, next(expand))
            base, own = self.place(value.base), self.own(None)
            self.steps.append(Encode(own, maps, base))
            _, *layout = maps.expand(value)
            places += [own, *map(self.keep, layout)]
        return places

    def operate(self, call: Call) -> None:
        """Write a step for an operator, unless what it returns are views of what is there."""
        made = [call.result] if isinstance(call.result, Tensor) else call.result
        if not isinstance(made, (list, tuple)) or not all(isinstance(x, Tensor) for x in made):
            raise _NoTapeError  # A value for Python.
        if torch.Tag.dynamic_output_shape in call.operator.tags and not _is_indexed(call):
            raise _NoTapeError
        writes = call.operator._schema.is_mutable
        taken = {_storage(x) for x in pytree.tree_leaves(call.arguments) if isinstance(x, Tensor) and x.numel()}
        views = [_storage(x) in taken for x in made]
        if any(views) and not writes:
            if not all(views):
                raise _NoTapeError
            return
        arguments, keywords = self.filled(list(call.arguments)), self.filled(call.keywords)
        own: tuple[int, ...] = ()
        if not writes:
            own = tuple(self.own(x) for x in made)
            for place, x in zip(own, made, strict=True):
                self.places.setdefault(_storage(x), []).append(place)
        self.steps.append(Operate(own, call.operator, arguments, keywords))

    def filled(self, value: Any) -> Any:
        """Return an operator's arguments with places for tensors."""
        if isinstance(value, Tensor):
            return At(self.place(value, whole=True))
        if isinstance(value, (list, tuple)):
            return [self.filled(each) for each in value]
        if isinstance(value, dict):
            return {name: self.filled(each) for name, each in value.items()}
        return value

    def result(self, x: Tensor) -> int:
        """Return the place of what the pass returns. An empty tensor is made in the shape that it is returned in."""
        if not x.numel():  # There is no memory to tell what it is.
            found = [place for place, root in enumerate(self.roots) if root is x]
            if not found:
                raise _NoTapeError
            return found[0]
        place = self.root(x)
        if place is None:
            return self.keep(x)
        root = self.roots[place]
        is_new = self.inputs <= place < self.first_temporary and place not in self.whole
        if is_new and x.numel() == root.numel() and x.is_contiguous() and root.is_contiguous():
            self.layouts[place - self.inputs] = _layout(x)
            self.whole.add(place)
            return place
        return self.place(x, whole=True)


def _is_indexed(call: Call) -> bool:
    """Return whether this picks entries by their numbers. By a mask, the size of the result would depend on values."""
    if call.operator.overloadpacket is not torch.ops.aten.index:
        return False
    return all(x is None or x.dtype in (torch.int32, torch.int64) for x in call.arguments[1])


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _span(x: Tensor) -> int:
    """Return the elements from a tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _layout(x: Tensor) -> dict[str, Any]:
    return {"size": x.shape, "stride": x.stride(), "dtype": x.dtype, "device": x.device}
