"""How a kernel starts: the first time through Triton's JIT, and from then on from what the JIT compiled.

The JIT binds and specialises every argument by name at every launch: 35 us for the 30 to 40 arguments of a kernel here.
What it looks at can be told sooner: the types, dtypes and alignment of tensors, and the values of constants and
integers. Where these are as they were, the kernel that it compiled for them starts again: 5 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import attrgetter, itemgetter, or_
from typing import Any

import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DIRECT_VERSIONS = ((3, 6), (3, 9))
"""The first and the last version of Triton whose compiled kernels are known to start as `_start` does it.

The JIT of each of them ends with the call that `_start` makes. With any other every launch goes through the JIT.
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


class Launcher:
    """Starts one kernel.

    Attributes:
        kernel: The kernel. Held, so that no other gets its id, by which `launch` finds this.
        direct: Whether compiled kernels may start without the JIT: not in the interpreter, nor in another version.
        bound: By the types of the arguments, where they lie, and what was compiled for them.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        first, last = DIRECT_VERSIONS
        self.direct = isinstance(kernel, JITFunction) and first <= version <= last and len(kernel.params) > 1
        if self.direct:
            self.values_of = itemgetter(*(parameter.name for parameter in kernel.params))
        self.bound: dict[tuple[type, ...], Bound] = {}

    def __call__(
        self, programs: int, arguments: dict[str, Any], warps: int, stages: int, options: dict[str, Any] | None
    ) -> None:
        if not self.direct or self.kernel.pre_run_hooks or _hooked():
            self._by_the_jit(programs, arguments, warps, stages, options)
            return
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
            compiled = self._by_the_jit(programs, arguments, warps, stages, options)
            if _is_direct(compiled, active):
                if len(bound.starts) >= MOST_BOUND:
                    bound.starts.clear()
                bound.starts[key] = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = start
        stream = active.get_current_stream(device)
        # No metadata and no hooks of a launch. A pointer may be an integer: then nobody asks the driver what it is.
        run(programs, 1, 1, stream, function, metadata, None, None, None, *bound.in_order(addresses + others))

    def _by_the_jit(
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
        descriptors = [place for place in others if types[place].__name__ == "TensorDescriptor"]
        numbers = [place for place in others if types[place] is float and not kernel.params[place].is_constexpr]
        apart = {*descriptors, *numbers}
        self.tensors, self.others = _picker(tensors), _picker(others)
        self.specialised = _picker([index for index, place in enumerate(others) if place not in apart])
        self.descriptors = _picker([others.index(place) for place in descriptors])
        self.described = bool(descriptors)
        shuffled = [*tensors, *others]
        self.in_order = _picker([shuffled.index(place) for place in places])
        self.starts: dict[Any, tuple[Any, Any, Any]] = {}


def _picker(places: Sequence[int]) -> Callable[[Any], tuple[Any, ...]]:
    """Return what takes these places of a tuple; itemgetter makes no tuple of one or none."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def _description(descriptor: Any) -> tuple[Any, ...]:
    """Return what a kernel is compiled for in a tensor descriptor. Its address, sizes and strides are read anew."""
    return descriptor.base.dtype, tuple(descriptor.block_shape), getattr(descriptor, "layout", None)


def _hooked() -> bool:
    """Return whether somebody listens to launches, as profilers do, or has a hand in compiling."""
    runtime = triton.knobs.runtime
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
