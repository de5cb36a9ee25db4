"""Clocks, interleaved repeats and the rates of the machine that times are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Run = Callable[[], Any]
Clock = Callable[[Run], float]
"""Runs something once and returns the seconds it took."""

Key = TypeVar("Key")

FLUSH_BYTES = 256 * 2**20
"""Written before every run on a GPU: more than any L2 (an H100 has 50 MB)."""


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentile of some repeats."""

    median: float
    p20: float
    p80: float
    repeats: int


def spread(samples: Sequence[float]) -> Spread:
    """Return the spread of at least one sample; percentiles are linear between the nearest ranks."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Spread(at(0.5), at(0.2), at(0.8), len(ordered))


def cpu_clock(run: Run) -> float:
    """Return the wall-clock seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock() -> Clock:
    """Return a clock by CUDA events; L2 is flushed before each run, outside the time."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def clock(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return clock


def clock_of(device: str) -> Clock:
    """Return the clock for a device, "cpu" or "cuda"."""
    return cuda_clock() if device == "cuda" else cpu_clock


def interleaved(runs: Mapping[Key, Run], repeats: Mapping[Key, int], clock: Clock) -> dict[Key, list[float]]:
    """Return `repeats` samples of each run, taken in turns, so that a noisy moment meets all of them.

    Fewer repeats of one are spread evenly over the turns of the others.
    """
    turns = max(repeats.values(), default=0)
    samples: dict[Key, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        for name, run in runs.items():
            if (turn + 1) * repeats[name] // turns > turn * repeats[name] // turns:
                samples[name].append(clock(run))
    return samples


def matmul_rate(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """Return the FLOP/s of a square matrix product, the best of five: what a share of is reported."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    samples = [clock(lambda: torch.mm(a, b, out=out)) for _ in range(6)]
    return 2 * size**3 / min(samples[1:])


def copy_rate(device: str, clock: Clock) -> float:
    """Return the bytes per second read and written by a copy far larger than caches, the best of five."""
    size = 2**30 if device == "cuda" else 2**27
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    samples = [clock(lambda: target.copy_(source)) for _ in range(6)]
    return 2 * size / min(samples[1:])
