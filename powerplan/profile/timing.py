"""Clocks, repeated timings in turns, and the rates of the machine that times are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, TypeVar

import torch

Run = Callable[[], Any]
Clock = Callable[[Run], float]
"""Runs something once and returns the seconds it took."""

Key = TypeVar("Key")

FLUSH_BYTES = 256 * 2**20
"""Bytes written before a run that shall not find its data in a cache: more than most L3 caches, and any GPU's L2."""

SETTLED_SPREAD = 0.1
"""A median is settled once the 20th and 80th percentiles are no further apart than this share of it."""

MIN_REPEATS = 5
"""Repeats before a median can be settled."""

FEW_REPEATS = 3
"""Repeats that a run gets beyond its share of the time, as far as its stage has time: one alone is at the mercy of
other programs. On a busy machine with 2 threads the same run took 4.9 to 12.9 s, and 0.42 s on a quiet one."""

MAX_REPEATS = 20
"""Repeats after which a run is not repeated further, settled or not."""

MAX_REPEATS_IN_A_TURN = 4
"""Most repeats of a short run in a turn, in which the longest run is done once."""


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of repeated timings, in seconds, and how many there were."""

    median: float
    p20: float
    p80: float
    repeats: int


def spread(samples: Sequence[float]) -> Spread:
    """Return the spread of at least one sample; percentiles are linear between the nearest ranks."""
    ordered = sorted(samples)

    def percentile(share: float) -> float:
        rank = share * (len(ordered) - 1)
        low, high = ordered[floor(rank)], ordered[ceil(rank)]
        return low + (high - low) * (rank - floor(rank))

    return Spread(percentile(0.5), percentile(0.2), percentile(0.8), len(ordered))


def settled(samples: Sequence[float]) -> bool:
    """Whether further repeats are not worth their time."""
    if len(samples) < MIN_REPEATS:
        return False
    times = spread(samples)
    return len(samples) >= MAX_REPEATS or times.p80 - times.p20 <= SETTLED_SPREAD * times.median


def cpu_clock(run: Run) -> float:
    """Return the wall-clock seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cold_cpu_clock() -> Clock:
    """Return a clock that fills the caches with other data before each run, outside the time."""
    # A decoding step in a model finds its state in memory, since the weights of all other layers were read after its
    # last step. Timed over and over, a step would find it in a cache, and more so the smaller the state.
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32)

    def clock(run: Run) -> float:
        flush.zero_()
        return cpu_clock(run)

    return clock


def clock_of(device: str) -> Clock:
    """Return a wall clock, or for a GPU one by CUDA events: L2 is flushed before each run, outside the time."""
    if not device.startswith("cuda"):
        return cpu_clock
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


def interleaved(
    runs: Mapping[Key, Run], repeats: Mapping[Key, int], clock: Clock, samples: dict[Key, list[float]] | None = None
) -> dict[Key, list[float]]:
    """Time each run as often as `repeats` says, in turns, so that a noisy moment on the machine affects all of them.
    Each time is added to `samples`, which is returned, as soon as it is known: an interrupt loses none."""
    turns = max(repeats.values(), default=0)
    samples = {} if samples is None else samples
    for key in runs:
        samples.setdefault(key, [])
    for turn in range(turns):
        for key, run in runs.items():
            if (turn + 1) * repeats[key] // turns > turn * repeats[key] // turns:
                samples[key].append(clock(run))
    return samples


def sample_until_settled(
    runs: Mapping[Key, Run], clock: Clock, allowance: float, samples: dict[Key, list[float]], at_most: float = 0.0
) -> None:
    """Time the runs in turns, at least once each, until all medians are settled or `allowance` seconds would be passed;
    a run of fewer than FEW_REPEATS times goes on until `at_most` seconds would be passed, where that is more.
    Times are added to `samples`. Where time is short, the longest runs stop first."""
    start = time.monotonic()
    while True:
        passed = time.monotonic() - start
        turn = _next_turn(runs, samples, allowance - passed, at_most - passed)
        if all(settled(samples.get(key, ())) for key in turn):
            return
        interleaved(turn, _repeats_in_a_turn(turn, samples), clock, samples)


def _next_turn(
    runs: Mapping[Key, Run], samples: Mapping[Key, Sequence[float]], left: float, left_for_few: float
) -> dict[Key, Run]:
    """Return the runs without a sample, and of the others as many as fit into `left` seconds, the shortest first; of
    those with few samples, as many as fit into `left_for_few` seconds, if that is more."""
    medians = {key: spread(samples[key]).median if samples.get(key) else 0.0 for key in runs}
    turn: dict[Key, Run] = {}
    taken = 0.0
    for key in sorted(runs, key=lambda key: medians[key]):
        count = len(samples.get(key, ()))
        seconds = max(left, left_for_few) if count < FEW_REPEATS else left
        affordable = taken + medians[key] <= seconds and count < MAX_REPEATS
        if affordable or not medians[key]:
            turn[key] = runs[key]
            taken += medians[key]
    return turn


def _repeats_in_a_turn(runs: Mapping[Key, Run], samples: Mapping[Key, list[float]]) -> dict[Key, int]:
    """Return how often each run is done in a turn: more than once if it takes less than half of the longest."""
    times = {key: spread(samples[key]).median for key in runs if samples.get(key)}
    longest = max(times.values(), default=0.0)
    repeats = {key: int(longest / seconds / 2) for key, seconds in times.items() if seconds}
    return {key: max(1, min(MAX_REPEATS_IN_A_TURN, repeats.get(key, 1))) for key in runs}


def matmul_rate(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """Return the FLOP/s of a square matrix product, the best of five runs."""

    def best(size: int, repeats: int) -> float:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        samples = [clock(lambda: torch.mm(a, b, out=out)) for _ in range(repeats + 1)]
        return 2 * size**3 / min(samples[1:])

    if device.startswith("cuda"):
        return best(8192, 5)
    rate = best(256, 5)
    # Where a processor emulates a dtype (0.3 GFLOP/s), larger products are no faster, and take minutes.
    if rate < 2e9:
        return rate
    return best(1024 if best(512, 2) < 4e11 else 2048, 5)


def copy_rate(device: str, clock: Clock) -> float:
    """Return the bytes per second that a copy far larger than caches reads and writes, the best of five runs."""
    size = 2**30 if device.startswith("cuda") else 2**27
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    samples = [clock(lambda: target.copy_(source)) for _ in range(6)]
    return 2 * size / min(samples[1:])
