"""How a kernel starts: the first time through Triton's JIT, and from then on from what the JIT compiled.

The JIT binds and specialises every argument by name at every launch: 35 us for the 30 to 40 arguments of a kernel here.
What it looks at can be told sooner: the types, dtypes and alignment of tensors, and the values of constants and
integers. Where these are as they were, the kernel that it compiled for them starts again: 5 us.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import attrgetter, itemgetter, or_
from typing import Any, NamedTuple, Protocol

import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DIRECT_VERSIONS = ((3, 6), (3, 9))
"""The first and the last version of Triton whose compiled kernels are known to start as `_run` does it.

The JIT of each of them ends with the call that `_run` makes. With any other every launch goes through the JIT.
"""

ALIGNMENT = 16
"""Triton compiles loads of up to this many bytes for a pointer that is a multiple of it."""

MOST_BOUND = 4096
"""Launches that are remembered for a kernel. Some of its integers grow with the context: not to hold all there were."""

_dtype = attrgetter("dtype")


def launch(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    warps: int = 4,
    stages: int = 2,
    options: dict[str, Any] | None = None,
) -> None:
    """Run `programs` programs of a kernel on the current device and stream.

    Kernels start here only, so that benchmarks/compiled.py can listen.

    Args:
        kernel: A function of triton.jit or of Gluon's jit.
        programs: The size of the grid.
        arguments: All of the kernel's parameters by name: tensors, tensor descriptors, numbers, constants.
        warps: Warps of a program.
        stages: Loads that are under way at a time.
        options: Other options of the compiler, such as maxnreg.
    """
    launcher = _launchers.get(id(kernel))
    if launcher is None:
        launcher = _launchers[id(kernel)] = Launcher(kernel)
    launcher(programs, arguments, warps, stages, options)


class Compiled(NamedTuple):
    """A kernel that the JIT compiled, and what a launch reads of it.

    kernel: as Triton has it
    run: its launcher
    function, packed_metadata: what that takes
    """

    kernel: Any
    run: Callable[..., Any]
    function: Any
    packed_metadata: Any


class Launch(NamedTuple):
    """A launch that was made.

    launcher, programs, warps, stages, options: what started it.
    arguments: the values of all parameters, in their order
    start: what starts the compiled kernel; None where there is no way but the JIT
    """

    launcher: Launcher
    programs: int
    arguments: tuple[Any, ...]
    warps: int
    stages: int
    options: dict[str, Any] | None
    start: Compiled | None

    def start_on(self, stream: int, values: Sequence[Any]) -> None:
        """Start the compiled kernel with the values of all parameters, or addresses in place of tensors."""
        assert self.start is not None
        _run(self.start, self.programs, stream, values)

    def again(self, values: Sequence[Any]) -> None:
        """Launch with other values, through the JIT."""
        arguments = dict(zip(self.launcher.names, values, strict=True))
        self.launcher.by_the_jit(self.programs, arguments, self.warps, self.stages, self.options)


def _run(start: Compiled, programs: int, stream: int, values: Sequence[Any]) -> None:
    """Do what ends every launch of Triton's JIT, without metadata and hooks.

    A pointer may be an integer, and then nobody asks the driver what kind of pointer it is.
    """
    _, run, function, metadata = start
    run(programs, 1, 1, stream, function, metadata, None, None, None, *values)


class Listener(Protocol):
    """Hears of the launches of its thread."""

    def begins(self) -> None:
        """A launch begins: all that happens until its end is the launch's."""

    def ends(self, launched: Launch) -> None:
        """It has been made."""


class _Listening(threading.local):
    listener: Listener | None = None


_listening = _Listening()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a listener hear of every launch of this thread."""
    before, _listening.listener = _listening.listener, listener
    try:
        yield
    finally:
        _listening.listener = before


class Launcher:
    """Starts one kernel.

    Attributes:
        kernel: The kernel. Held, so that no other gets its id, by which `launch` finds this.
        names: The names of its parameters.
        direct: Whether compiled kernels may start without the JIT: not in the interpreter, nor in another version.
        bound: By the types of the arguments, where they lie, and what was compiled for them.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        first, last = DIRECT_VERSIONS
        self.direct = isinstance(kernel, JITFunction) and first <= version <= last
        self.names = tuple(kernel.arg_names)
        self.values_of = itemgetter(*self.names)  # of two parameters at least
        self.bound: dict[tuple[type, ...], Bound] = {}

    def __call__(
        self, programs: int, arguments: dict[str, Any], warps: int, stages: int, options: dict[str, Any] | None
    ) -> None:
        listener = _listening.listener
        if listener is None:
            self._start(programs, arguments, warps, stages, options)
            return
        listener.begins()
        start = self._start(programs, arguments, warps, stages, options)
        listener.ends(Launch(self, programs, self.values_of(arguments), warps, stages, options, start))

    def _start(
        self, programs: int, arguments: dict[str, Any], warps: int, stages: int, options: dict[str, Any] | None
    ) -> Compiled | None:
        """Start the kernel, and return what starts it without the JIT, if anything does."""
        if not self.direct or self.kernel.pre_run_hooks or is_listened_to():
            self.by_the_jit(programs, arguments, warps, stages, options)
            return None
        values = self.values_of(arguments)
        types = tuple(map(type, values))
        bound = self.bound.get(types)
        if bound is None:
            bound = self.bound[types] = Bound(self.kernel, types)
        tensors, others = bound.tensors(values), bound.others(values)
        addresses = tuple(map(Tensor.data_ptr, tensors))
        active = driver.active
        device = active.get_current_device()
        key = (
            device,
            warps,
            stages,
            None if options is None else tuple(options.items()),
            bound.specialised(others),
            tuple(map(_dtype, tensors)),
            # All are aligned, as a rule, and one operation tells. What is at odd addresses is another kernel.
            reduce(or_, addresses, 0) % ALIGNMENT and tuple(address % ALIGNMENT == 0 for address in addresses),
            bound.described and tuple(map(_description, bound.descriptors(others))),
        )
        start = bound.starts.get(key)
        if start is None:
            compiled = self.by_the_jit(programs, arguments, warps, stages, options)
            if not _is_direct(compiled, active):
                return None
            if len(bound.starts) >= MOST_BOUND:
                bound.starts.clear()
            start = Compiled(compiled, compiled.run, compiled.function, compiled.packed_metadata)
            bound.starts[key] = start
            return start
        _run(start, programs, active.get_current_stream(device), bound.in_order(addresses + others))
        return start

    def by_the_jit(
        self, programs: int, arguments: dict[str, Any], warps: int, stages: int, options: dict[str, Any] | None
    ) -> Any:
        """Start the kernel as Triton does, and return what was compiled."""
        more = {} if options is None else options
        return self.kernel[(programs,)](
            **arguments, num_warps=warps, num_stages=stages, **({"enable_fp_fusion": True} | more)
        )


_launchers: dict[int, Launcher] = {}


class Bound:
    """Where arguments of some types lie in a kernel's parameters, and the kernels that were compiled for them.

    Attributes:
        tensors: Picks the tensors among the values of all parameters.
        others: Picks all others.
        specialised: Picks, among these, what a kernel is compiled for: constants, and integers, which are when they are
            1 or a multiple of 16. A number with a fraction is not.
        descriptors: Picks the tensor descriptors among the others.
        described: Whether there are any.
        in_order: Puts tensors, or their addresses, and others in the order of the parameters again.
        starts: What starts a kernel, by what it was compiled for.
    """

    def __init__(self, kernel: Any, types: tuple[type, ...]) -> None:
        places = range(len(types))
        tensors = [place for place in places if issubclass(types[place], Tensor)]
        others = [place for place in places if place not in tensors]
        descriptors = [place for place in others if types[place].__name__ == _DESCRIPTOR]
        numbers = [place for place in others if types[place] is float and not kernel.params[place].is_constexpr]
        apart = {*descriptors, *numbers}
        self.tensors, self.others = picker(tensors), picker(others)
        self.specialised = picker([index for index, place in enumerate(others) if place not in apart])
        self.descriptors = picker([others.index(place) for place in descriptors])
        self.described = bool(descriptors)
        shuffled = [*tensors, *others]
        self.in_order = picker([shuffled.index(place) for place in places])
        self.starts: dict[Any, Compiled] = {}


def picker(places: Sequence[int]) -> Callable[[Any], tuple[Any, ...]]:
    """Return what takes these places of a tuple; itemgetter makes no tuple of one or none."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


_DESCRIPTOR = "TensorDescriptor"
"""The name of the types that describe a tensor to the GPU's tensor memory access: triton's own and Gluon's."""


def is_descriptor(value: Any) -> bool:
    """Return whether this describes a tensor to the GPU's tensor memory access."""
    return type(value).__name__ == _DESCRIPTOR


def _description(descriptor: Any) -> tuple[Any, ...]:
    """Return what a kernel is compiled for in a tensor descriptor. Its address, sizes and strides are read anew."""
    return descriptor.base.dtype, tuple(descriptor.block_shape), getattr(descriptor, "layout", None)


_RUNTIME = getattr(getattr(triton, "knobs", None), "runtime", None)


def is_listened_to() -> bool:
    """Return whether somebody listens to launches, as profilers do, or has a hand in compiling."""
    runtime = _RUNTIME
    if runtime is None:  # before triton 3.4, where all launches go through the JIT
        return False
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or runtime.add_stages_inspection_hook
    )


def _is_direct(compiled: Any, active: Any) -> bool:
    """Return whether this is a compiled kernel for an NVIDIA GPU: a hook may have kept the JIT from compiling, and one
    that another thread compiles is none yet."""
    ready = not hasattr(compiled, "result") and all(
        hasattr(compiled, name) for name in ("run", "function", "packed_metadata")
    )
    return ready and active.get_current_target().backend == "cuda"
