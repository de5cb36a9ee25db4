"""What a call of power attention costs the host, in microseconds, where no kernel runs: no GPU is needed.

Tensors are on the CPU, and the driver that Triton starts kernels with does nothing, so that what is left is Python,
torch and Triton's own way to a launch. The call into a GPU's driver, from 5 to 45 microseconds a launch, is not in it,
nor are tensor descriptors, which Triton encodes there. The time of an autograd.Function that computes nothing, measured
between the calls, is the yardstick of the machine. Rows come twice: of the kernels for any GPU, and of Hopper's own.

With --launchers Triton's own launchers run, over a CUDA driver that does nothing (stub_driver.py), and what they cost
is in it, too. Rows come in two kinds that take turns: by the functions in C that the launchers end in, with tensor maps
kept (triton/entry.py), and by the launchers, which have a tensor map encoded for each descriptor of each launch.

Usage: python benchmarks/host_time.py [--launchers] [--tokens 4096] [--heads 8] [--dim 64] [--repeats 300] [--out FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # triton 3.9 warns at every call where it is not set

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from powerplan.kernels import api, power_attention
from powerplan.kernels.triton import replay, shapes
from powerplan.kernels.triton.entry import entry_of
from stub_driver import StubDriver, StubKernel, lacking


class NoDriver:
    """Stands for the driver of a GPU of compute capability 9.0 that starts nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class NoKernel:
    """Stands for a compiled kernel, with the attributes that a launch reads, and counts its launches."""

    launches = 0
    function = 1
    packed_metadata = (4, 1, 0)
    metadata = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0)

    def run(self, *_: Any) -> None:
        NoKernel.launches += 1

    def launch_metadata(self, *_: Any) -> None:
        return None


Count = Callable[[], tuple[int, int]]
"""Returns how many launches there have been, and how many tensor maps have been encoded."""


def no_kernels() -> tuple[Any, Callable[..., Any], Count]:
    """Return a driver, what makes a kernel of a JIT function and a signature, and a count: without any launchers."""
    return NoDriver(), lambda *_: NoKernel(), lambda: (NoKernel.launches, 0)


def stub_kernels(folder: Path) -> tuple[Any, Callable[..., Any], Count]:
    """Return the same of kernels with Triton's launchers."""
    stub = StubDriver(folder)
    return (
        stub,
        lambda kernel, signature: StubKernel(kernel, signature, stub),
        lambda: (stub.started.value, stub.encoded.value),
    )


@contextmanager
def without_a_gpu(hopper: bool, active: Any, compiled: Callable[..., Any]) -> Iterator[None]:
    """Let impl="triton" run on CPU tensors, and kernels compile to nothing.

    Args:
        hopper: Whether Hopper's own engine runs.
        active: Triton's driver.
        compiled: Makes a kernel of a JIT function and its signature.
    """

    def do_compile(self: Any, key: Any, signature: Any, device: int, *_: Any, **__: Any) -> Any:
        kernel = self.device_caches[device][0][key] = compiled(self, signature)
        return kernel

    with ExitStack() as stack:
        stack.enter_context(patch.object(api, "lacking", lambda *_: None))
        stack.enter_context(patch.object(shapes, "hopper_lacking", lambda *_: None if hopper else "not asked for"))
        shapes._launch_shape.cache_clear()  # A shape remembers its engine.
        stack.enter_context(patch.object(JITFunction, "_do_compile", do_compile))
        before = driver._active
        driver.set_active(active)
        stack.callback(driver.set_active, before)
        yield


class Nothing(torch.autograd.Function):
    """An autograd.Function of three tensors that computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def keep_memory() -> None:
    """Let glibc keep what is freed, as torch's allocator for GPUs does: mmap and munmap cost 10 us for each output."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    libc.mallopt(m_mmap_threshold, 32 * 2**20)
    libc.mallopt(m_trim_threshold, 2**30)


def both_passes(call: Callable[..., Tensor], tensors: tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
    """Return a function that runs the call forward and backward, as a training step does."""

    def run() -> object:
        return torch.autograd.grad(call(*tensors), tensors, grad)

    return run


def variants(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    size = (1, options.tokens, options.heads, options.dim)
    q, k, v = (torch.randn(size, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    log_g = (-torch.rand(size[:3])).requires_grad_()
    grad = torch.randn(size, dtype=torch.bfloat16)

    def attend(*tensors: Tensor) -> Tensor:
        out = power_attention(*tensors, impl="triton")
        assert isinstance(out, Tensor)
        return out

    def plain_sums(*tensors: Tensor) -> Tensor:
        out = power_attention(*tensors, impl="triton", normalize=False)
        assert isinstance(out, Tensor)
        return out

    def inference(*tensors: Tensor) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return attend(*tensors)

        return run

    return {
        "empty Function, forward and backward": both_passes(Nothing.apply, (q, k, v), grad),
        "no gradients": inference(q, k, v),
        "no gradients, gated": inference(q, k, v, log_g),
        "forward": lambda: attend(q, k, v),
        "forward, gated": lambda: attend(q, k, v, log_g),
        "forward and backward": both_passes(attend, (q, k, v), grad),
        "forward and backward, gated": both_passes(attend, (q, k, v, log_g), grad),
        "forward and backward, gated, no normaliser": both_passes(plain_sums, (q, k, v, log_g), grad),
    }


def calls_in(run: Callable[[], object]) -> int:
    """Return how many functions a run calls, in Python and in C: work that no busy machine changes."""
    count = 0

    def listen(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(listen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


class Way:
    """A way in which tapes start kernels, with tapes of its own: by functions in C (`kept`), or by launchers."""

    def __init__(self, name: str, kept: bool) -> None:
        self.name = name
        self.entry_of = entry_of if kept else lambda _: None
        self.shapes = lru_cache(maxsize=1024)(shapes._launch_shape.__wrapped__)

    def take(self, run: Callable[[], object]) -> Callable[[], object]:
        """Return what runs in this way."""

        def taken() -> object:
            with patch.object(replay, "entry_of", self.entry_of), patch.object(shapes, "_launch_shape", self.shapes):
                return run()

        return taken


def counted(run: Callable[[], object], count: Count) -> tuple[int, int]:
    """Return the launches of a run, and the tensor maps that it has encoded."""
    launches, encoded = count()
    run()
    now = count()
    return now[0] - launches, now[1] - encoded


def timed(run: Callable[[], object], times: list[float]) -> Callable[[], None]:
    """Return what appends the time of a run."""

    def taken() -> None:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)

    return taken


def measure(ways: list[Way], runs: dict[str, Callable[[], object]], count: Count, repeats: int) -> list[dict[str, Any]]:
    """Return the median and the least time of each run in each way, its launches, and the functions that it calls.

    They take turns, so that all see one machine. Of the maps that ten runs encode the fewest count: the addresses that
    a CPU's allocator gives are not the same at every run.
    """
    rows, turns = [], []
    for name, run in runs.items():
        for way in ways:
            counts = [counted(way.take(run), count) for _ in range(10)]
            launches, encoded = counts[-1][0], min(encoded for _, encoded in counts)
            calls: list[int] = []
            way.take(lambda run=run, calls=calls: calls.append(calls_in(run)))()  # type: ignore[misc]
            times: list[float] = []
            turns.append(way.take(timed(run, times)))
            work = {"launches": launches, "encoded": encoded, "calls": calls[0]}
            rows.append(({"name": name, "starts": way.name}, times, work))
    for index in range(repeats):
        # In both orders: what runs after its like finds more in the caches.
        for turn in reversed(turns) if index % 2 else turns:
            turn()
    return [
        names | {"median_us": round(1e6 * statistics.median(times), 1), "least_us": round(1e6 * min(times), 1)} | work
        for names, times, work in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--launchers", action="store_true", help="with Triton's launchers, which takes a C compiler")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    missing = lacking() if options.launchers else None
    if missing is not None:
        sys.exit(f"host_time.py --launchers needs {missing}; without it no launcher runs")
    torch.set_num_threads(1)
    keep_memory()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        active, compiled, count = stub_kernels(Path(folder)) if options.launchers else no_kernels()
        for engine in ("plain", "hopper"):
            ways = [Way("kept", True), Way("launchers", False)] if options.launchers else [Way("nothing", False)]
            with without_a_gpu(engine == "hopper", active, compiled):
                of_engine = measure(ways, variants(options), count, options.repeats)
            rows += [{"engine": engine} | row for row in of_engine]
    for row in rows:
        times = f"{row['median_us']:>8.1f} us, at least {row['least_us']:>8.1f}"
        counts = f"{row['launches']} launches, {row['encoded']} maps encoded, {row['calls']} calls"
        print(f"{row['engine']:<7} {row['name']:<42} {row['starts']:<9} {times}, {counts}")
    if options.out is not None:
        result = {
            "schema": "powerplan.host_time/1",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "shape": {"batch": 1, "tokens": options.tokens, "heads": options.heads, "dim": options.dim},
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
