"""Kernels that start by the functions in C of Triton's launchers, with tensor maps that are kept by address."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiler_runs import OTHER_TRITON, needs_other_triton, run
from triton.backends.nvidia.driver import CudaLauncher
from triton.tools.tensor_descriptor import TensorDescriptor

from powerplan.kernels.triton import entry
from powerplan.kernels.triton.entry import Maps, entry_of

SAMPLES = Path(__file__).with_name("entry_samples.py")


@pytest.mark.parametrize("triton", [None, pytest.param(OTHER_TRITON, marks=needs_other_triton)], ids=["this", "3.6"])
def test_an_entry_hands_over_what_a_launcher_does(triton: str | None) -> None:
    """Every argument of every launch of training calls, and all that tensor maps are encoded from."""
    done = run(SAMPLES, triton=triton)
    assert done.returncode == 0, done.stderr
    seen: dict[str, list[int]] = json.loads(done.stdout)
    # Launches and maps. Hopper's kernels read their tensors by 24 descriptors, for p = 1 none of phi and its products.
    of_hopper = {name: counts for name, counts in seen.items() if name.startswith("hopper")}
    assert len(seen) == 2 * len(of_hopper) == 18
    assert {maps for _, maps in of_hopper.values()} == {24, 14}
    assert of_hopper["hopper, gates"] == [14, 24]
    assert of_hopper["hopper, p = 1"] == [10, 14]
    assert all(maps == 0 for name, (_, maps) in seen.items() if name not in of_hopper)


def described(x: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [16, 16])


def encode(descriptor: Any) -> list[Any]:
    """Return what make_tensordesc_arg returns: a map, which is another object at every time, sizes and strides."""
    return [SimpleNamespace(address=descriptor.base.data_ptr()), *descriptor.shape, *descriptor.strides]


def test_an_address_has_one_map() -> None:
    x = torch.zeros(32, 16)
    maps = Maps(described(x), encode)
    first = maps[x.data_ptr()]
    assert first.address == x.data_ptr()
    assert maps[x.data_ptr()] is first
    other = maps[x.data_ptr() + 256]
    assert other.address == x.data_ptr() + 256
    assert maps[x.data_ptr()] is first


def test_maps_hold_no_tensor_and_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(16, 16)
    maps, gone = Maps(described(x), encode), weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    monkeypatch.setattr(entry, "MOST_MAPS", 8)
    for address in range(0, 100 * 16, 16):
        assert maps[address].address == address
    assert len(maps) <= 8


def launcher(**changes: Any) -> Any:
    """Return a launcher as Triton 3.7 to 3.9 makes it for a kernel with a descriptor, with changes; None removes."""

    def wrapping(launcher: Any) -> Any:
        return lambda *given: launcher(*given)

    made = object.__new__(CudaLauncher)
    made.__dict__ |= {
        "launch": wrapping(print),
        "launch_cooperative_grid": False,
        "launch_pdl": True,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
        "arg_annotations": ["annotations"],
        "kernel_signature": b"signature",
    }
    made.__dict__ |= changes
    for name in [name for name, value in changes.items() if value is None]:
        del made.__dict__[name]
    return made


def compiled(run: Any, kinds: tuple[str, ...] = ("*fp32", "tensordesc<bf16[16, 16]>"), layouts: Any = ({},)) -> Any:
    source = SimpleNamespace(signature=dict(enumerate(kinds)))
    metadata = SimpleNamespace(tensordesc_meta=layouts)
    return SimpleNamespace(run=run, function=7, packed_metadata=(4, 1, 0), src=source, metadata=metadata)


def test_the_two_ways_in_which_values_are_handed_over() -> None:
    """One by one in triton 3.6, and from 3.7 on as a tuple, with annotations before it."""
    handed: list[Any] = []

    def keep(*given: Any) -> None:
        handed.append(given)

    for changes in ({}, {"arg_annotations": None, "kernel_signature": None}):
        made = entry_of(compiled(launcher(launch=keep, **changes), ("*fp32", "i32"), ()))
        assert made is not None
        made.start(3, 5, (11, 13))
    assert handed == [
        (3, 1, 1, 5, 7, False, True, (4, 1, 0), None, None, None, None, None, ["annotations"], b"signature", (11, 13)),
        (3, 1, 1, 5, 7, False, True, None, None, (4, 1, 0), None, None, None, 11, 13),
    ]
    made = entry_of(compiled(launcher()))
    assert made is not None
    assert made.call is print
    assert len(made.expand) == 1


class Other(CudaLauncher):
    """A launcher that does more, as far as anybody knows."""


@pytest.mark.parametrize(
    "given",
    [
        compiled(print),
        compiled(object.__new__(Other)),
        compiled(object.__new__(CudaLauncher)),
        compiled(launcher(launch_pdl=None)),
        compiled(launcher(global_scratch_size=128)),
        compiled(launcher(profile_scratch_size=128)),
        compiled(launcher(gsan_enabled=True)),
        compiled(launcher(launch=print)),
        compiled(launcher(launch=lambda *_: None)),
        compiled(launcher(), layouts=()),
        compiled(launcher(), layouts=None),
        compiled(launcher(), layouts=[None]),
        compiled(launcher(), layouts=[{}, {}]),
    ],
    ids=range(13),
)
def test_what_is_not_known_is_left_to_the_launcher(given: Any) -> None:
    assert entry_of(given) is None


@pytest.mark.parametrize("replaced", [None, print, lambda descriptor: [], lambda *given: []])
def test_another_function_for_descriptors_is_left_to_the_launcher(
    replaced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.backends.nvidia.driver.make_tensordesc_arg", replaced)
    assert entry_of(compiled(launcher())) is None
    monkeypatch.delattr("triton.backends.nvidia.driver.make_tensordesc_arg")
    assert entry_of(compiled(launcher())) is None
    assert entry_of(compiled(launcher(launch=print), ("i32",), None)) is not None
