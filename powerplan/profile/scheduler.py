"""What is timed next, and for how long, so that a profile ends within its time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from powerplan.profile.costs import run_costs
from powerplan.profile.machine import Machine
from powerplan.profile.workload import Point, TimedMixer, Workload

STAGE_SHARES = {"weights": 0.12, "state": 0.5, "crossover": 0.45, "chunks": 0.6, "layers": 0.9}
"""Share of the time left that each stage may take. The stages follow one another in this order."""

MAX_WEIGHT_TOKENS = 2048
"""Most tokens at which projections and FFN are timed: their time per token does not depend on the context."""

MIN_WEIGHT_TOKENS = 64
"""Fewest tokens at which projections and FFN are timed."""

WEIGHT_RUNS = 20
"""Projections and FFN are timed at as many tokens as let this many of their runs fit into the time of their stage."""

SHORTEST_CONTEXT = 64
"""The shortest context that is chosen where the user gave none."""

FIRST_CONTEXT_SHARE = 0.06
"""Contexts that the user did not give are shortened until a run at the first takes this share of the time left."""

FIRST_GUESS = 4.0
"""Until a similar run has been timed, expect a run to take this many times its roofline time."""

WARM_UP_RUNS = 1.5
"""A warm-up takes as long as this many runs: it is the first, and torch's profiler watches its memory (1.1 to 1.8)."""

COMPILE_S = 10.0
"""FlexAttention is compiled at every context, which takes about this many seconds."""


@dataclass
class TimeLimit:
    """The seconds that a profile may take, from now on."""

    seconds: float
    start: float = field(default_factory=lambda: time.monotonic())

    def passed(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        """Return the seconds that are left, negative past the limit."""
        return self.seconds - self.passed()


class Allowance(NamedTuple):
    """The seconds that all repeats at a point may take together, and the most that the point may take: warm-ups, one
    run of each mixer and, with few_on_top, the repeats up to FEW_REPEATS."""

    repeats: float
    at_most: float
    few_on_top: bool = True


@dataclass
class Scheduler:
    """Orders the points of a workload, and gives each a share of the time that is left."""

    workload: Workload
    machine: Machine
    limit: TimeLimit
    _slowdowns: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """Measured time over roofline time by part, name of the mixer ("" for the last one timed) and pass."""

    def contexts(self, subject: TimedMixer) -> list[int]:
        """Return the workload's contexts; where the user gave none, divided by 4 until a run of the first is short."""
        contexts = list(self.workload.contexts)
        while self.workload.may_shorten and contexts[0] > SHORTEST_CONTEXT:
            points = [Point("state", pass_name, contexts[0]) for pass_name in self.workload.passes]
            if max(self.expected(subject, point) for point in points) < self.limit.left() * FIRST_CONTEXT_SHARE:
                break
            contexts = [context // 4 for context in contexts]
        return contexts

    def weight_point(self, pass_name: str) -> Point:
        """Return the point at which projections are timed, and the FFN likewise: as many tokens as suit the time."""
        point, workload = Point("projections", pass_name, 1), self.workload
        if point.decodes:
            return point
        parts = (point, point._replace(part="ffn"))
        flops = max(sum(run_costs(workload, timed, part, True)[0] for part in parts) for timed in workload.mixers)
        seconds = self.limit.left() * STAGE_SHARES["weights"] / WEIGHT_RUNS
        affordable = seconds * self.machine.matmul_flops_per_s / float(flops)
        tokens = MAX_WEIGHT_TOKENS
        while tokens > MIN_WEIGHT_TOKENS and tokens > affordable:
            tokens //= 2
        return point._replace(context=tokens)

    def allot(self, stage: str, points: Sequence[Point]) -> Iterator[tuple[Point, Allowance]]:
        """Yield each point with its share of the stage's time; time that one does not use goes to those after it."""
        remaining = self.stage_timer(STAGE_SHARES[stage])
        for index, point in enumerate(points):
            seconds = remaining()
            yield point, Allowance(seconds / (len(points) - index), at_most=seconds)

    def stage_timer(self, share: float) -> Callable[[], float]:
        """Return a function for the seconds left of a stage that starts now and may take `share` of the time left."""
        end = self.limit.left() * (1 - share)
        return lambda: self.limit.left() - end

    def fits(self, timed: TimedMixer, point: Point, seconds: float) -> bool:
        """Whether a warm-up and a run are expected to fit into `seconds`."""
        return self.needed(timed, point) <= seconds

    def needed(self, timed: TimedMixer, point: Point) -> float:
        """Return the seconds that a warm-up and one run are expected to take."""
        compiling = COMPILE_S if _is_compiled(timed, point) else 0.0
        return (WARM_UP_RUNS + 1) * self.expected(timed, point) + compiling

    def expected(self, timed: TimedMixer, point: Point) -> float:
        """Return a run's roofline time, times the factor by which the most similar run was slower than its own."""
        part, pass_name, _ = point
        similar = [(part, timed.name, pass_name), (part, timed.name, "forward"), (part, "", pass_name)]
        if part == "layer":
            similar.append(("state", timed.name, pass_name))
        slowdown = next((self._slowdowns[key] for key in similar if key in self._slowdowns), FIRST_GUESS)
        return self._roofline(timed, point) * slowdown

    def observe(self, timed: TimedMixer, point: Point, seconds: float) -> None:
        """Learn from a run that took `seconds` how long similar ones will take."""
        slowdown = seconds / self._roofline(timed, point)
        self._slowdowns[point.part, timed.name, point.pass_name] = slowdown
        self._slowdowns[point.part, "", point.pass_name] = slowdown

    def expect_like(self, timed: TimedMixer, known: TimedMixer, pass_name: str) -> None:
        """Expect the mixer alone to be as slow as `known`, until it has been timed itself."""
        slowdown = self._slowdowns.get(("state", known.name, pass_name), FIRST_GUESS)
        self._slowdowns.setdefault(("state", timed.name, pass_name), slowdown)

    def _roofline(self, timed: TimedMixer, point: Point) -> float:
        flops, moved_bytes = run_costs(self.workload, timed, point, executed=True)
        return self.machine.peak.roofline_s(float(flops), float(moved_bytes))


def _is_compiled(timed: TimedMixer, point: Point) -> bool:
    """Whether a run compiles FlexAttention: that of a window on a GPU, where the context is longer than it."""
    window = timed.mixer.window_size
    return timed.impl == "flex" and window is not None and point.tokens > window and point.part in ("state", "layer")
