"""Gluon kernels in emulation: right results, and an error where a GPU would read too early, too late, or for ever."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import gluon_samples
import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language import NVMMASharedLayout, SwizzledSharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_on_cpu import emulated
from gluon_on_cpu.memory import Shared, allocate
from gluon_on_cpu.program import program

pytestmark = pytest.mark.skipif(
    os.environ.get("POWERPLAN_TEST_DEVICE", "cpu") != "cpu", reason="with a GPU there is nothing to emulate"
)


@pytest.fixture(scope="module")
def samples() -> Iterator[ModuleType]:
    with emulated("gluon_samples"):
        yield importlib.import_module("gluon_samples")


def outer(
    samples: ModuleType, dtype: torch.dtype = torch.bfloat16, stages: int = 3, fault: str = "", cut: int = 0
) -> tuple[Tensor, Tensor]:
    """Return what outer_kernel makes of 100 rows in two programs, and the same in float64. B lacks `cut` rows."""
    rows, tiles, v = 100, 2, 64
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, 8 * tiles, generator=make).to(dtype) for _ in range(2))
    b = torch.randn(tiles * tiles * 64 - cut, v, generator=make).to(dtype)
    out = torch.full((rows, v), float("nan"))
    b_desc = TensorDescriptor.from_tensor(b, [64, v], NVMMASharedLayout(128, 16, 2))
    o_desc = TensorDescriptor.from_tensor(out, [64, v], NVMMASharedLayout(128, 32, 2))
    samples.outer_kernel[(2,)](b_desc, o_desc, x, y, rows, TILES=tiles, V=v, STAGES=stages, FAULT=fault, num_warps=4)
    # Products of two features are rounded to the operands' type.
    pairs = x.view(rows, tiles, 1, 8, 1) * y.view(rows, 1, tiles, 1, 8)
    wide = torch.nn.functional.pad(b.double(), (0, 0, 0, cut))
    return out, pairs.reshape(rows, -1).double() @ wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_products_of_tiles(samples: ModuleType, dtype: torch.dtype, stages: int) -> None:
    out, exact = outer(samples, dtype, stages)
    # Operands are exact, so what is left is a sum of 256 terms in float32.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=256 * 2**-24 * exact.abs().max().item())


def test_tiles_past_the_end_are_zero(samples: ModuleType) -> None:
    out, exact = outer(samples, cut=40)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=256 * 2**-24 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("rolled", RuntimeError, "made again while the product may still read its registers"),
        ("parity", RuntimeError, "wait for parity 1 passes at once: phase 0 is under way"),
        ("bytes", RuntimeError, "wait for phase 0 never ends: 1 of 1 arrivals, 8192 of 4096 bytes"),
        ("no wait", RuntimeError, "product of shared memory before the wait for the copy that fills it"),
        ("slot", RuntimeError, "copy to shared memory that the product in line [0-9]+ may still read"),
        ("early", RuntimeError, "result of a product is used before a warpgroup_mma_wait"),
        ("mask", IndexError, "load of elements 1024 to 2039 of a tensor of 1600"),
        ("left", RuntimeError, "the program ends while 2 copies are under way"),
        ("fence", RuntimeError, r"copy of shared memory that was stored to: fence_async_shared\(\) is missing"),
        ("store", RuntimeError, r"store_wait\(0\) is missing"),
    ],
)
def test_faults_of_timing_raise(samples: ModuleType, fault: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        outer(samples, fault=fault)


def chain(samples: ModuleType, fault: str = "") -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    x, v = (torch.randn(4, 64, 64, generator=make).bfloat16() for _ in range(2))
    out = torch.full((64, 64), float("nan"))
    samples.chain_kernel[(1,)](x, v, out, 4, FAULT=fault, num_warps=4)
    return out, (x.float().square().bfloat16().double() @ v.double()).sum(0)


def test_an_operand_carried_to_the_next_iteration(samples: ModuleType) -> None:
    out, exact = chain(samples)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=256 * 2**-24 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("unnamed", "whose deps do not name it: nothing keeps its registers"),
        ("late", "was made in the iteration before, and the registers"),
    ],
)
def test_a_carried_operand_that_is_not_kept_raises(samples: ModuleType, fault: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        chain(samples, fault)


def test_operands_that_are_not_kept_can_be_let_through() -> None:
    with emulated("gluon_samples", operands=False, double=True):
        found = importlib.import_module("gluon_samples")
        out, exact = outer(found, fault="rolled")
        torch.testing.assert_close(out, exact.float(), rtol=2**-22, atol=0)
        out, exact = chain(found, fault="late")
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=2**-22 * exact.abs().max().item())


def test_views_and_elements(samples: ModuleType) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    out = torch.full((4, 8, 16), float("nan"))
    samples.pieces_kernel[(1,)](x, out, SCALE=4.0, num_warps=4)
    torch.testing.assert_close(out[0], 3 * x, rtol=0, atol=0)
    # In memory: the left halves of all rows, then the right ones.
    torch.testing.assert_close(out[1], torch.stack((x[:, :8], x[:, 8:])).reshape(8, 16), rtol=0, atol=0)
    torch.testing.assert_close(out[2], x.view(8, 8, 2).flip(2).reshape(8, 16), rtol=0, atol=0)
    power = torch.exp2(x)
    even = torch.arange(16) % 2 == 0
    torch.testing.assert_close(out[3], power * power + torch.where(even, power, 0.0))


def test_plain_kernels_of_the_same_module_run_in_the_interpreter(samples: ModuleType) -> None:
    x, out = torch.randn(48), torch.full((48,), float("nan"))
    samples.twice_kernel[(1,)](x, out, 3, BLOCK=16)
    assert torch.equal(out, 2 * x)


def test_only_the_package_is_emulated_and_only_while_asked_for() -> None:
    before = sys.modules["gluon_samples"]
    with emulated("gluon_samples"):
        stand_in = importlib.import_module("gluon_samples")
        assert type(stand_in.outer_kernel).__module__ == "gluon_on_cpu"
        assert sys.modules["triton.experimental.gluon"] is gluon
    assert sys.modules["gluon_samples"] is before is not stand_in
    assert isinstance(gluon_samples.outer_kernel, GluonJITFunction)


def test_what_has_no_stand_in_says_so(samples: ModuleType) -> None:
    with pytest.raises(NotImplementedError, match=r"gl\.histogram is not emulated: add it to __init__\.py"):
        _ = samples.gl.histogram
    with pytest.raises(TypeError, match="chain_kernel has no argument warps"):
        samples.chain_kernel[(1,)](warps=4)


@pytest.fixture
def memory() -> Iterator[Any]:
    with program((0, 0, 0), (1, 1, 1)):
        yield lambda *shape: allocate(torch.float32, shape, SwizzledSharedLayout(1, 1, 1, [1, 0]))


def test_shared_memory_begins_as_nan_and_keeps_its_bounds(memory: Any) -> None:
    tiles: Shared = memory(2, 4)
    assert tiles.load().isnan().all()
    with pytest.raises(IndexError, match="index 2 of 2 in shared memory"):
        tiles.index(2)
    with pytest.raises(ValueError, match=r"store of \[5\] to shared memory of \[4\]"):
        tiles.index(0).store(torch.zeros(5))


def test_columns_of_one_tile_do_not_touch(memory: Any) -> None:
    tile: Shared = memory(4, 8)
    left, right = tile.slice(0, 4, dim=1), tile.slice(4, 4, dim=1)
    assert not left.touches(right)
    assert left.touches(tile.slice(3, 2, dim=1))
    assert tile.permute([1, 0]).touches(left)
