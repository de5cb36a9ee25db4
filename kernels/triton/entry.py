"""The function in C that a launcher of Triton ends in, and the tensor maps that it takes in place of descriptors.

At every launch a launcher of Triton expands each tensor descriptor in Python: it has the 128 bytes encoded that the
GPU's tensor memory access reads (CUtensorMap), and hands these, the sizes and the strides to a function in C. What is
encoded follows from the address, the sizes and strides, and what the compiler made of the block and its layout. Between
the runs of a tape only the address differs, so that a map kept by address is what encoding would give again. It says
where a tensor would lie, and not that there is one: it stays true when memory is freed and used anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

MOST_MAPS = 512
"""Addresses whose maps are kept for one descriptor, at 0.4 KB each: all layers of a model share a tape."""

_READ = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
"""What is read of a launcher, in all versions that `launching.DIRECT_VERSIONS` names."""


class Address:
    """Stands for a tensor that a descriptor describes: a launch asks it for its address and for nothing else."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        """Return the address."""
        return self.address


def with_base(descriptor: Any, base: Any) -> Any:
    """Return a copy of a tensor descriptor with another tensor. A new one would check the same layout again: 5 us."""
    same = object.__new__(type(descriptor))
    same.__dict__.update(descriptor.__dict__)
    same.base = base
    return same


class Entry(NamedTuple):
    """How the function in C starts a compiled kernel.

    call: the function
    between: what it takes between the stream and the values of the kernel's parameters
    packed: whether it takes the values as one argument
    expand: for each descriptor, in the order of the parameters, what makes a list of it: map, sizes, strides
    """

    call: Callable[..., Any]
    between: tuple[Any, ...]
    packed: bool
    expand: tuple[Callable[[Any], Sequence[Any]], ...]

    def start(self, programs: int, stream: int, values: tuple[Any, ...]) -> None:
        """Start the kernel; values: of its parameters, with descriptors expanded."""
        if self.packed:
            self.call(programs, 1, 1, stream, *self.between, values)
        else:
            self.call(programs, 1, 1, stream, *self.between, *values)


def entry_of(compiled: Any) -> Entry | None:
    """Return how to start a compiled kernel without Triton's launcher, or None where that does more than is known here.

    A launcher of Triton 3.6 takes the values one by one, from 3.7 to 3.9 as a tuple, with annotations before it.
    """
    from triton.backends.nvidia import driver

    launcher = compiled.run
    if type(launcher) is not driver.CudaLauncher or not all(hasattr(launcher, name) for name in _READ):
        return None
    # Memory for scratch is new at every launch, and a sanitizer of memory (gsan) adds arguments.
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None
    expand = _expansions(compiled, getattr(driver, "make_tensordesc_arg", None))
    call = launcher.launch if not expand else _wrapped(launcher.launch)
    if expand is None or call is None:
        return None
    how = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    scratch = hooks = (None, None)
    metadata = (compiled.packed_metadata, None)
    if not hasattr(launcher, "arg_annotations"):
        return Entry(call, (*how, *scratch, *metadata, *hooks), False, expand)
    values = (launcher.arg_annotations, launcher.kernel_signature)
    return Entry(call, (*how, *metadata, *hooks, *scratch, *values), True, expand)


def _wrapped(expanding: Any) -> Any:
    """Return the function in C that Triton has wrapped in one that expands descriptors, or None."""
    names = getattr(getattr(expanding, "__code__", None), "co_freevars", ())
    return expanding.__closure__[names.index("launcher")].cell_contents if "launcher" in names else None


def _expansions(compiled: Any, expand: Any) -> tuple[Callable[[Any], Sequence[Any]], ...] | None:
    """Return `Entry.expand`, or None where descriptors become anything but maps, sizes and strides."""
    described = [kind for kind in compiled.src.signature.values() if str(kind).startswith("tensordesc")]
    if not described:
        return ()
    layouts = getattr(compiled.metadata, "tensordesc_meta", None) or ()
    takes = getattr(getattr(expand, "__code__", None), "co_argcount", 0)
    if takes not in (2, 3) or len(described) != len(layouts) or None in layouts:
        return None
    more = (None,) * (takes - 2)  # From 3.8 on it takes the launch's own arguments too, and does not read them.
    return tuple([lambda descriptor, layout=layout: expand(descriptor, layout, *more) for layout in layouts])


class Maps(dict[int, Any]):
    """The tensor maps of one descriptor of a kernel by address, encoded when they are first asked for.

    Args:
        descriptor: One for a tensor of the layout; what it describes is not held.
        expand: Of `Entry.expand`, the one for this descriptor.
    """

    def __init__(self, descriptor: Any, expand: Callable[[Any], Sequence[Any]]) -> None:
        super().__init__()
        self.descriptor = with_base(descriptor, None)
        self.expand = expand

    def __missing__(self, address: int) -> Any:
        made = self.expand(with_base(self.descriptor, Address(address)))[0]
        if len(self) >= MOST_MAPS:
            self.clear()
        self[address] = made
        return made
