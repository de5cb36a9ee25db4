"""Clocks, interleaved repeats and the rates of the machine that times are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Run = Callable[[], Any]
Clock = Callable[[Run], float]
"""Runs something once and returns the seconds it took."""

Key = TypeVar("Key")

FLUSH_BYTES = 256 * 2**20
"""Written before a run that is to find caches cold: more than any L2 of a GPU (an H100 has 50 MB) and most L3."""

SETTLED = 0.1
"""A median is settled where the 20th and the 80th percentile are this share of it apart, or less."""

FEWEST, MOST = 5, 20
"""Repeats before a median can be settled, and after which there are no more."""

MOST_IN_A_TURN = 4
"""Repeats of a cheap run in the turn in which the dearest one runs once."""


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


def settled(samples: Sequence[float]) -> bool:
    """Whether more repeats would not tell more."""
    if len(samples) < FEWEST:
        return False
    found = spread(samples)
    return len(samples) >= MOST or found.p80 - found.p20 <= SETTLED * found.median


def cpu_clock(run: Run) -> float:
    """Return the wall-clock seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cold_cpu_clock() -> Clock:
    """Return a clock that fills the caches with something else before each run, outside the time.

    What a decoding step meets in a model, whose weights pass between two steps of a layer; and what makes steps
    comparable that are timed in turns with others of larger state.
    """
    import torch

    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32)

    def clock(run: Run) -> float:
        flush.zero_()
        return cpu_clock(run)

    return clock


def cuda_clock(device: str = "cuda") -> Clock:
    """Return a clock by CUDA events; L2 is flushed before each run, outside the time."""
    import torch

    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

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
    """Return the clock for a device, "cpu", "cuda" or "cuda:1"."""
    return cuda_clock(device) if device.startswith("cuda") else cpu_clock


def interleaved(
    runs: Mapping[Key, Run], repeats: Mapping[Key, int], clock: Clock, samples: dict[Key, list[float]] | None = None
) -> dict[Key, list[float]]:
    """Return `repeats` samples of each run, taken in turns, so that a noisy moment meets all of them.

    Fewer repeats of one are spread evenly over the turns of the others. They are added to `samples`, one by one, where
    that is given: what an interrupt leaves there is whole.
    """
    turns = max(repeats.values(), default=0)
    samples = {} if samples is None else samples
    for name in runs:
        samples.setdefault(name, [])
    for turn in range(turns):
        for name, run in runs.items():
            if (turn + 1) * repeats[name] // turns > turn * repeats[name] // turns:
                samples[name].append(clock(run))
    return samples


def repeated(runs: Mapping[Key, Run], clock: Clock, allowance: float, samples: dict[Key, list[float]]) -> None:
    """Add to `samples` in turns until all medians are settled, or another run would pass `allowance` seconds.

    Every run gets one sample at least, and cheap ones several in the turn of a dear one. Where time is short, the dear
    ones stop first.
    """
    start = time.monotonic()
    while True:
        due = _due(runs, samples, allowance - (time.monotonic() - start))
        if all(settled(samples.get(name, ())) for name in due):
            return
        interleaved(due, _turns(due, samples), clock, samples)


def _due(runs: Mapping[Key, Run], samples: Mapping[Key, Sequence[float]], left: float) -> dict[Key, Run]:
    """Return what to run in the next turn: what has no sample yet, and as many others as fit, the cheapest first."""
    medians = {name: spread(samples[name]).median if samples.get(name) else 0.0 for name in runs}
    due: dict[Key, Run] = {}
    for name in sorted(runs, key=lambda name: medians[name]):
        if medians[name] <= left and len(samples.get(name, ())) < MOST:
            due[name] = runs[name]
            left -= medians[name]
        elif not medians[name]:
            due[name] = runs[name]
    return due


def _turns(runs: Mapping[Key, Run], samples: Mapping[Key, list[float]]) -> dict[Key, int]:
    times = {name: spread(samples[name]).median for name in runs if samples.get(name)}
    longest = max(times.values(), default=0.0)
    return {
        name: max(1, min(MOST_IN_A_TURN, int(longest / times[name] / 2))) if times.get(name) else 1 for name in runs
    }


def matmul_rate(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """Return the FLOP/s of a square matrix product, the best of five: what a share of is reported."""
    import torch

    def best(size: int, repeats: int) -> float:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        samples = [clock(lambda: torch.mm(a, b, out=out)) for _ in range(repeats + 1)]
        return 2 * size**3 / min(samples[1:])

    if device.startswith("cuda"):
        return best(8192, 5)
    # A CPU without matrix units for a dtype can be 50 times slower in it, and then a small product says as much.
    slow = best(512, 2) < 4e10
    return best(1024 if slow else 2048, 5)


def copy_rate(device: str, clock: Clock) -> float:
    """Return the bytes per second read and written by a copy far larger than caches, the best of five."""
    import torch

    size = 2**30 if device.startswith("cuda") else 2**27
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    samples = [clock(lambda: target.copy_(source)) for _ in range(6)]
    return 2 * size / min(samples[1:])
