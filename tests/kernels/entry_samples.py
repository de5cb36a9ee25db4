"""What Triton's launchers and the entries of tapes hand to the function in C that starts a kernel: prints JSON.

For whole training calls, with the launchers of the Triton that is installed. Python stands for what is C in these, and
a tensor map is what it would be encoded from. Addresses are numbered in the order in which a pass names them, since two
calls of one kind allocate at other ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from torch import Tensor
from triton.backends.nvidia import driver as nvidia

from host_time import NoDriver, without_a_gpu
from powerplan.dims import hopper_takes
from powerplan.kernels import power_attention
from powerplan.kernels.call import CallShape
from powerplan.kernels.triton import replay, shapes
from powerplan.kernels.triton.entry import entry_of
from powerplan.kernels.triton.tape import Describe, Encode, Enter, Start, Tape
from stub_driver import StubKernel

ADDRESS = 2**40
"""Whatever integer is larger lies in memory: of a process on Linux, addresses do."""

Call = tuple[Any, ...]


class RecordingDriver(NoDriver):
    """Keeps what the function in C is called with, pass by pass, and the tapes."""

    def __init__(self) -> None:
        self.passes: list[list[Call]] = []
        self.launcher_cls = nvidia.CudaLauncher
        self.utils = SimpleNamespace(
            launch=self.record,
            fill_tma_descriptor=self.encode,  # before triton 3.7
            fill_tma_descriptor_tiled=self.encode,
            build_signature_metadata=tuple,
        )

    def record(self, *given: Any) -> None:
        if self.passes:
            self.passes[-1].append(given)

    def encode(self, *given: Any) -> Call:
        return ("map", *plain(given))


def plain(value: Any) -> Any:
    """Return a value with tuples in place of lists and sizes."""
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def numbered(calls: list[Call]) -> Any:
    """Return calls with addresses numbered by their first use."""
    numbers: dict[int, str] = {}

    def without(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(without, value))
        if type(value) is int and value > ADDRESS:
            return numbers.setdefault(value, f"address {len(numbers)}")
        return value

    return without(plain(calls))


@contextmanager
def recording() -> Iterator[RecordingDriver]:
    """Let launchers be made without a compiler, and calls be kept by the passes that a tape runs."""
    active = RecordingDriver()
    run = Tape.run

    def listened(tape: Tape, *given: Any) -> Any:
        active.passes.append([])
        return run(tape, *given)

    def build(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(launch=active.record)

    def annotation(**of: Any) -> tuple[Any, ...]:
        return tuple(of.items())

    changed: dict[str, Any] = {
        "library_dirs": list,
        "compile_module_from_src": build,  # before triton 3.7, for each signature
        "PyKernelArg": annotation,
        "ARG_CONSTEXPR": 0,
        "ARG_KERNEL": 1,
        "ARG_TUPLE": 2,
    }
    with patch.multiple(nvidia, create=True, **changed), patch.object(Tape, "run", listened):
        yield active


def tapes_and_passes(
    active: RecordingDriver, call: Callable[[], object], entry: Any
) -> tuple[list[Tape], list[list[Call]]]:
    """Return the tapes of a call, and what the passes of its fourth run handed over."""
    made: list[Tape] = []
    written = replay._Writer.tape

    def write(writer: Any) -> Tape:
        made.append(written(writer))
        return made[-1]

    shapes._launch_shape.cache_clear()
    with patch.object(replay, "entry_of", entry), patch.object(replay._Writer, "tape", write):
        for _ in range(4):
            active.passes.clear()
            call()
    return made, list(active.passes)


def training_call(head_dim: int, dtype: torch.dtype, gated: bool, heads: int, **settings: Any) -> Callable[[], object]:
    size = (1, 256, heads, head_dim)
    q = torch.randn(size, dtype=dtype).requires_grad_()
    k, v = (torch.randn(1, 256, 2, head_dim, dtype=dtype).requires_grad_() for _ in range(2))
    log_g = (-torch.rand(1, 256, 2)).requires_grad_() if gated else None
    tensors = [x for x in (q, k, v, log_g) if x is not None]

    def run() -> object:
        out = power_attention(q, k, v, log_g, chunk_size=128, impl="triton", **settings)
        out = out if isinstance(out, Tensor) else out[0]
        return torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run


def takes(call: CallShape, dtype: torch.dtype, device: torch.device) -> bool:
    """`shapes.uses_hopper` for any device and all degrees, also those that no GPU has run."""
    return dtype.itemsize == 2 and hopper_takes(call.p, call.head_dim, call.v_head_dim, untried=True)


BF16 = torch.bfloat16

SAMPLES: dict[str, tuple[int, torch.dtype, bool, int, dict[str, Any]]] = {
    "gates": (64, BF16, True, 2, {}),
    "neither": (64, BF16, False, 2, {"normalize": False}),
    "more heads, wide": (128, BF16, True, 4, {}),
    "narrow": (32, BF16, True, 2, {}),
    "float16": (64, torch.float16, True, 2, {}),
    "p = 1": (64, BF16, True, 2, {"p": 1, "normalize": False}),
    "p = 3": (64, BF16, True, 2, {"p": 3, "normalize": False}),
    "packed": (64, BF16, True, 2, {"cu_seqlens": torch.tensor([0, 100, 256])}),
    "state": (64, BF16, True, 2, {"return_state": True}),
}
"""By name: head dim, dtype, whether there are gates, heads, and settings. Layouts of tiles differ with head dims, and
there are operators between the kernels of the last two."""


def compare(active: RecordingDriver, name: str, hopper: bool) -> tuple[int, int]:
    """Compare what is handed over in both ways, and return how many launches and how many tensor maps it takes."""
    head_dim, dtype, gated, heads, settings = SAMPLES[name]
    call = training_call(head_dim, dtype, gated, heads, **settings)
    takes_hopper = patch.object(shapes, "uses_hopper", takes if hopper else lambda *_: False)
    with without_a_gpu(hopper, active, lambda *of: StubKernel(*of, active)), takes_hopper:
        by_entries, handed = tapes_and_passes(active, call, entry_of)
        by_launchers, wanted = tapes_and_passes(active, call, lambda _: None)
    entries, launchers = ([step for tape in tapes for step in tape.steps] for tapes in (by_entries, by_launchers))
    assert not any(isinstance(step, (Start, Describe)) for step in entries), name
    assert not any(isinstance(step, (Enter, Encode)) for step in launchers), name
    assert len(handed) == len(wanted) == 2, name
    for one, other in zip(handed, wanted, strict=True):
        assert one, name
        assert numbered(one) == numbered(other), name
    return sum(map(len, handed)), sum(isinstance(step, Encode) for step in entries)


def main() -> None:
    with recording() as active:
        seen = {
            f"{'hopper' if hopper else 'plain'}, {name}": compare(active, name, hopper)
            for hopper, name in product((True, False), SAMPLES)
        }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
