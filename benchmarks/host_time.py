"""What a call of power attention costs the host, in microseconds, where no kernel runs: no GPU is needed.

Tensors are on the CPU, and the driver that Triton starts kernels with does nothing, so that what is left is Python,
torch and Triton's own way to a launch. The call into a GPU's driver, from 5 to 45 microseconds a launch, is not in it,
nor are tensor descriptors, which Triton encodes there. The time of an autograd.Function that computes nothing, measured
between the calls, is the yardstick of the machine. Rows come twice: of the kernels for any GPU, and of Hopper's own.

Usage: python benchmarks/host_time.py [--tokens 4096] [--heads 8] [--dim 64] [--repeats 300] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from powerplan.kernels.triton import shapes


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


@contextmanager
def without_a_gpu(hopper: bool) -> Iterator[None]:
    """Let impl="triton" run on CPU tensors, and kernels compile to nothing; hopper: those of Hopper's own engine."""

    def do_compile(self: Any, key: Any, signature: Any, device: int, *_: Any, **__: Any) -> NoKernel:
        kernel = self.device_caches[device][0][key] = NoKernel()
        return kernel

    with ExitStack() as stack:
        stack.enter_context(patch.object(api, "lacking", lambda *_: None))
        stack.enter_context(patch.object(shapes, "hopper_lacking", lambda *_: None if hopper else "not asked for"))
        shapes._launch_shape.cache_clear()  # A shape remembers its engine.
        stack.enter_context(patch.object(JITFunction, "_do_compile", do_compile))
        active = driver._active
        driver.set_active(NoDriver())
        stack.callback(driver.set_active, active)
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


def measure(timed: dict[str, Callable[[], object]], repeats: int) -> list[dict[str, Any]]:
    """Return the median and the least time of each, its launches, and the functions that it calls.

    They take turns, so that all see one machine.
    """
    times: dict[str, list[float]] = {name: [] for name in timed}
    launches = {}
    for run in timed.values():
        for _ in range(10):
            run()
    calls = {name: calls_in(run) for name, run in timed.items()}
    for _ in range(repeats):
        for name, run in timed.items():
            NoKernel.launches = 0
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
            launches[name] = NoKernel.launches
    return [
        {
            "name": name,
            "median_us": round(1e6 * statistics.median(each), 1),
            "least_us": round(1e6 * min(each), 1),
            "launches": launches[name],
            "calls": calls[name],
        }
        for name, each in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    rows = []
    for engine in ("plain", "hopper"):
        with without_a_gpu(engine == "hopper"):
            rows += [{"engine": engine} | row for row in measure(variants(options), options.repeats)]
    for row in rows:
        times = f"{row['median_us']:>8.1f} us, at least {row['least_us']:>8.1f}"
        print(f"{row['engine']:<7} {row['name']:<42} {times}, {row['launches']} launches, {row['calls']} calls")
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
