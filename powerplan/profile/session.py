"""One profile from start to end: the stages, in their order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from powerplan.errors import MachineError
from powerplan.profile.breakdown import breakdown
from powerplan.profile.checks import check_all
from powerplan.profile.crossover import Pair, find_crossover
from powerplan.profile.machine import Machine, choose_threads, emulation_note, examine, used
from powerplan.profile.memory import SHARE_OF_FREE, free_bytes, memory_limited
from powerplan.profile.record import Record
from powerplan.profile.result import PASSES, Breakdown, Profile
from powerplan.profile.runner import Runner
from powerplan.profile.runs import prepare
from powerplan.profile.scheduler import STAGE_SHARES, Allowance, Scheduler, TimeLimit
from powerplan.profile.timing import cold_cpu_clock
from powerplan.profile.workload import Point, TimedMixer, Workload

MAX_CROSSOVER_S = 3.0
"""Most seconds for the repeats of both mixers at one context of a crossover search."""

CHECKS_SHARE = 0.5
"""A check may begin until the checks have taken this share of the time that was left when they began."""

BREAKDOWN_RUNS = 3
"""A breakdown is expected to take as long as this many runs: a warm-up, and a run that the profiler slows down."""


@dataclass
class Session:
    """Times a workload: checks every implementation first, then measures until the time limit.

    Args:
        workload: What is timed.
        time_limit: Seconds for the whole profile. Checks may take half of them: a mixer whose check would begin later
            is left out. On a GPU, where checks compile kernels, the time begins after them.
        memory_limit: Bytes that one run may take; None for 70 % of the free memory.
        progress: Is told what runs now, and the share of the time limit that has passed.
        started: The reading of time.monotonic() at which the time began; None for the start of `run`.
        ended: Is called when measuring has ended, by itself or by Ctrl-C: from then on there is something to lose.
    """

    workload: Workload
    time_limit: float = 60.0
    memory_limit: int | None = None
    progress: Callable[[str, float], None] = lambda text, share: None
    started: float | None = None
    ended: Callable[[], None] = lambda: None

    def run(self) -> Profile:
        """Return the profile.

        Returns:
            All that was measured, and what was not. After Ctrl-C it holds what was measured until then.

        Raises:
            MachineError: If an implementation is wrong here, or nothing was measured.
            KeyboardInterrupt: After Ctrl-C, if nothing was measured until then.
        """
        workload = self.workload
        start = time.monotonic() if self.started is None else self.started
        whole = self.limit = TimeLimit(self.time_limit, start)
        self._need_time("torch was loaded")
        self.record = Record(workload)
        machine: Machine | None = None
        memory_limit = self.memory_limit or int(SHARE_OF_FREE * free_bytes(workload.device))
        # Made before the memory limit holds: the buffer that fills the caches is not part of a run.
        cold = cold_cpu_clock() if "decode" in workload.passes and not workload.on_gpu else None
        try:
            with used(workload.device), memory_limited(memory_limit, workload.device):
                self._tell("matrix product and copy")
                notes = [choose_threads(workload.device)]
                machine = examine(workload.device, workload.dtype)
                notes.append(emulation_note(machine, workload.dtype))
                self.record.notes += filter(None, notes)
                self._need_time("the rates of this machine were measured")
                may_check = self._check_timer()
                check_all(workload, self.record, self._tell, may_check)
                if workload.on_gpu:
                    # The checks compiled kernels, which takes a minute at the first time and seconds at the next.
                    seconds = self.limit.passed()
                    self.record.notes.append(f"kernels were compiled and checked in {seconds:.0f} s, before the limit")
                    self.limit = TimeLimit(self.time_limit)
                self._need_time("the checks ended")
                self.scheduler = Scheduler(workload, machine, self.limit)
                self.runner = Runner(workload, self.scheduler, self.record, memory_limit, cold, self._tell)
                self._stages()
                self.ended()
        except KeyboardInterrupt:
            self.ended()
            if not self.record.rows:
                raise
            self.record.interrupted = True
            self.record.miss("all that was to follow", "interrupted")
        if not self.record.rows or machine is None:
            raise MachineError(f"nothing was measured: {self.record.first_reason()}")
        return self.record.profile(machine, whole.passed())

    def _need_time(self, done: str) -> None:
        """Raise MachineError where the time limit has passed before anything was timed; `done` says what took it."""
        if self.limit.left() <= 0:
            passed = f"{done} after {self.limit.passed():.1f} s"
            raise MachineError(f"nothing was measured: {passed}, past the limit; give a longer --time-limit")

    def _check_timer(self) -> Callable[[], bool]:
        """Return a function that says whether another check may begin; on a GPU always."""
        end = self.limit.left() * (1 - CHECKS_SHARE)
        return lambda: self.workload.on_gpu or self.limit.left() > end

    def _tell(self, text: str) -> None:
        self.progress(text, min(1.0, self.limit.passed() / self.limit.seconds))

    def _stages(self) -> None:
        workload, able, softmax = self.workload, self.record.able(self.workload.mixers), self.workload.softmax
        subjects = self.record.able(workload.subjects)  # At least one: without any, the checks ended the session.
        self._weights(able)
        contexts = self.scheduler.contexts(subjects[0])
        points = [Point("state", pass_name, context) for context in contexts for pass_name in workload.passes]
        points.sort(key=lambda point: not point.decodes)  # Decoding first, since it takes milliseconds a run.
        for point, allowance in self.scheduler.allot("state", points):
            self.runner.time(point, able, allowance)
        for pass_name in workload.passes:
            if softmax is not None and softmax in able:
                self._crossover(subjects[0], softmax, pass_name)
        for pass_name in workload.passes:
            for subject in subjects if workload.chunk_sizes else ():
                self._chunk_sizes(subject, pass_name)
        for pass_name in workload.passes if workload.breakdown else ():
            self._breakdown(subjects[0], pass_name)
        layer_points = [point._replace(part="layer") for point in points if not point.decodes]
        for point, allowance in self.scheduler.allot("layers", layer_points):
            self.runner.time(point, able, allowance)

    def _weights(self, able: list[TimedMixer]) -> None:
        """Time the projections, once for mixers that share them and not for recurrent kinds, and the FFN."""
        by_projections: dict[object, TimedMixer] = {}
        for timed in able:
            if timed.is_recurrent:
                continue
            by_projections.setdefault(timed.projection_key, timed)
        for pass_name in self.workload.passes:
            point, distinct = self.scheduler.weight_point(pass_name), list(by_projections.values())
            seconds = STAGE_SHARES["weights"] * self.limit.left() / len(self.workload.passes) / 2
            self.runner.time(point, distinct, Allowance(seconds, at_most=self.limit.left() / 4))
            if self.workload.ffn is not None:
                point = point._replace(part="ffn")
                self.runner.time(point, able[:1], Allowance(seconds, at_most=self.limit.left() / 4))

    def _crossover(self, subject: TimedMixer, softmax: TimedMixer, pass_name: str) -> None:
        """Look for the context from which the subject is faster than softmax attention."""
        own, other = (self.record.medians(timed, pass_name) for timed in (subject, softmax))
        known: dict[int, Pair] = {context: (own[context], other[context]) for context in own.keys() & other.keys()}
        passes = self.workload.passes
        remaining = self.scheduler.stage_timer(STAGE_SHARES["crossover"] / (len(passes) - passes.index(pass_name)))
        rows, missing = len(self.record.rows), len(self.record.missing)

        def measure(context: int) -> Pair | None:
            point, seconds = Point("state", pass_name, context), remaining()
            if sum(self.scheduler.needed(timed, point) for timed in (subject, softmax)) > seconds:
                return None
            allowance = Allowance(min(seconds, MAX_CROSSOVER_S), at_most=seconds, few_on_top=False)
            medians = self.runner.time(point, [subject, softmax], allowance)
            return (medians[subject], medians[softmax]) if len(medians) == 2 else None

        direction = PASSES[pass_name]
        try:
            crossover = find_crossover(known, measure, name=subject.name, against=softmax.name, direction=direction)
        finally:
            # These times belong to the crossover, not to the table of contexts.
            del self.record.rows[rows:], self.record.missing[missing:]
        if crossover is not None:
            self.record.crossovers.append(crossover)

    def _chunk_sizes(self, subject: TimedMixer, pass_name: str) -> None:
        """Time power attention in every further chunk size, at the longest context that was measured."""
        context = max(self.record.medians(subject, pass_name), default=None)
        if pass_name == "decode" or context is None or subject.chunk_size is None:
            return
        sizes = [size for size in self.workload.chunk_sizes if size != subject.chunk_size]
        variants = [subject.with_chunk_size(size) for size in sizes]
        for variant in variants:
            self.scheduler.expect_like(variant, subject, pass_name)
        seconds = STAGE_SHARES["chunks"] * self.limit.left() / len(self.workload.passes)
        self.runner.time(Point("state", pass_name, context), variants, Allowance(seconds, at_most=seconds))

    def _breakdown(self, subject: TimedMixer, pass_name: str) -> None:
        """Show where the time of the subject goes, at the longest context that was measured."""
        context = max(self.record.medians(subject, pass_name), default=None)
        if context is None:
            return
        point = Point("state", pass_name, context)
        self._tell(f"breakdown of {point.direction} at {context:,} tokens: {subject.name}")
        if BREAKDOWN_RUNS * self.scheduler.expected(subject, point) > self.limit.left():
            self.record.miss(f"breakdown of {point.direction}", "no time is left for it")
            return
        parts = tuple(breakdown(prepare(self.workload, subject, point), self.workload.device))
        name, impl, direction = subject.name, subject.impl, point.direction
        run = Breakdown(name=name, impl=impl, direction=direction, context=context, parts=parts)
        self.record.breakdowns.append(run)
