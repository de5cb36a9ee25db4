"""Times one point: prepares the runs of the mixers, warms them up, and repeats them in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from powerplan.profile.memory import bytes_needed, is_out_of_memory, peak_of
from powerplan.profile.record import Record
from powerplan.profile.runs import prepare
from powerplan.profile.scheduler import Allowance, Scheduler
from powerplan.profile.timing import Clock, Run, sample_until_settled, spread
from powerplan.profile.workload import Point, TimedMixer, Workload
from powerplan.units import format_bytes

MAX_PROFILED_STEPS = 1000
"""Most chunks (or single tokens) of a run whose memory torch's profiler watches: each makes dozens of events."""


@dataclass
class Runner:
    """Times the runs of a workload on one machine; `tell` is told what runs now."""

    workload: Workload
    scheduler: Scheduler
    record: Record
    memory_limit: int  # Bytes that one run may take.
    decoding_clock: Clock | None  # For decoding steps, where it is not the machine's.
    tell: Callable[[str], None]

    def time(self, point: Point, mixers: Sequence[TimedMixer], allowance: Allowance) -> dict[TimedMixer, float]:
        """Time the mixers at one point in turns, record times (an interrupt loses none), and return the medians."""
        runs: dict[TimedMixer, Run] = {}
        samples: dict[TimedMixer, list[float]] = {}
        peaks: dict[TimedMixer, int] = {}
        medians: dict[TimedMixer, float] = {}
        start, limit = self.scheduler.limit.passed(), self.scheduler.limit
        reserved = 0.0  # Seconds for the first sample of the runs that are warm.
        try:
            for timed in mixers:
                if self._fits(timed, point, allowance.at_most - (limit.passed() - start) - reserved):
                    self.tell(f"{point.describe()}: {timed.name}")
                    with self._recording_out_of_memory(point, timed.name):
                        runs[timed] = self._warmed_up(timed, point, peaks)
                        reserved += self.scheduler.expected(timed, point)
            self._drop_late(runs, point)
            names = ", ".join(timed.name for timed in runs)
            self.tell(f"{point.describe()}: {names}")
            with self._recording_out_of_memory(point, names):
                at_most = allowance.at_most - (limit.passed() - start)
                few = at_most if allowance.few_on_top else 0.0
                sample_until_settled(runs, self._clock(point), min(allowance.repeats, at_most), samples, few)
        finally:
            for timed in mixers:
                if samples.get(timed):
                    times = spread(samples[timed])
                    medians[timed] = times.median
                    self.scheduler.observe(timed, point, times.median)
                    self.record.add(self.scheduler.machine, timed, point, times, peaks.get(timed))
        return medians

    def _clock(self, point: Point) -> Clock:
        return self.decoding_clock if point.decodes and self.decoding_clock else self.scheduler.machine.clock

    def _fits(self, timed: TimedMixer, point: Point, seconds: float) -> bool:
        """Whether a run fits into the memory and into `seconds`; a run that does not is recorded as missing."""
        needed = bytes_needed(self.workload, timed, point)
        if needed > self.memory_limit:
            limit = format_bytes(self.memory_limit)
            reason = f"it would take about {format_bytes(needed)}, and the limit is {limit}"
            self.record.miss_run(point, timed.name, reason)
        elif not self.scheduler.fits(timed, point, seconds):
            seconds = self.scheduler.expected(timed, point)
            self.record.miss_run(point, timed.name, "too long for the time that was left", seconds)
        else:
            return True
        return False

    def _drop_late(self, runs: dict[TimedMixer, Run], point: Point) -> None:
        """Drop the runs for which the time limit has passed, as warm-ups took longer than expected."""
        left = self.scheduler.limit.left()
        for timed in list(runs):
            seconds = self.scheduler.expected(timed, point)
            if left <= 0:
                del runs[timed]
                self.record.miss_run(point, timed.name, "too long for the time that was left", seconds)
            left -= seconds

    def _warmed_up(self, timed: TimedMixer, point: Point, peaks: dict[TimedMixer, int]) -> Run:
        """Prepare a run and do it once, untimed, with its peak memory measured.

        The first run never counts: it compiles, starts threads and touches new pages, and a profiler watches it: power
        attention in training takes 1.6 times the processor's time then.
        """
        run, clock = prepare(self.workload, timed, point), self._clock(point)
        times: list[float] = []
        chunk = 1 if timed.impl == "recurrent" else timed.chunk_size
        steps = point.context / chunk if chunk and point.part in ("state", "layer") else 0
        if not self.workload.on_gpu and steps > MAX_PROFILED_STEPS:
            times.append(clock(run))
        else:
            peaks[timed] = peak_of(lambda: times.append(clock(run)), self.workload.device)
        if not self.workload.on_gpu:  # There a first run compiles kernels, and says nothing of the next.
            self.scheduler.observe(timed, point, times[0])
        return run

    @contextmanager
    def _recording_out_of_memory(self, point: Point, name: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.record.miss_run(point, name, "out of memory")
            if self.workload.on_gpu:
                torch.cuda.empty_cache()
