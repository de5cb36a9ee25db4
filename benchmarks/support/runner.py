"""Runs sweeps within a time limit: checks first, estimates, skips what does not fit, times in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from powerplan.profile.breakdown import breakdown
from powerplan.profile.timing import Clock, Run, cold_cpu_clock, interleaved, spread
from support.checks import Checked, check
from support.memory import peak_bytes
from support.peers import UnavailableError, prepare
from support.presets import Sweep
from support.rows import Row, with_ratios
from support.shapes import Shape, Variant

PROBE_TOKENS = 1024
"""Where the time of a first run is taken, from which that of longer contexts is extrapolated."""

MEMORY_RUN_S = 15.0
"""Memory is measured in a run of its own; slower ones are left out."""

WARM_RUN_S = 0.5
"""A CPU is warm after the probe: only runs shorter than this are warmed up at full length too."""

DECODE_REPEATS = 60
"""A step takes less than a millisecond, of which a few repeats say little."""


class WrongResultError(Exception):
    """An implementation of power attention is not within its error budget: nothing is timed."""


@dataclass
class Runner:
    """Measures shapes one after another until `limit_s` seconds have passed since `start`."""

    device: str
    clock: Clock
    repeats: int
    limit_s: float
    start: float
    memory: bool
    profiled: bool
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.checks: dict[tuple[Variant, Shape], Checked | str | None] = {}
        self.seen: dict[tuple[Variant, Shape], tuple[int, float]] = {}
        self.cold = self.clock if self.device == "cuda" else cold_cpu_clock()

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.limit_s - (time.monotonic() - self.start)

    def run(self, sweeps: Iterable[Sweep]) -> list[Row]:
        """Return a row for every variant at every shape. Raises WrongResultError."""
        cells = [(shape, sweep) for sweep in sweeps for shape in sweep.shapes(self.device)]
        for shape, sweep in cells:
            for variant in sweep.variants(self.device):
                self._check(shape, variant)
        rows: list[Row] = []
        for index, (shape, sweep) in enumerate(cells):
            self.say(f"{shape.kind} {shape.tokens:,} tokens, {shape.heads} heads of {shape.head_dim}")
            longest = shape.tokens == max(sweep.contexts)
            allowance = self.left() / (len(cells) - index)
            rows += self._cell(shape, sweep.variants(self.device), allowance, self.profiled and longest)
        return with_ratios(rows)

    def _check(self, shape: Shape, variant: Variant) -> None:
        """Check `variant` once for all contexts of a pass, and remember why it cannot run if so."""
        key = (variant, replace(shape, tokens=0))
        if key in self.checks:
            return
        try:
            self.checks[key] = found = check(shape, variant)
        except (UnavailableError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
            self.checks[key] = reason(error)
            return
        if found is not None and not found.passed and variant.is_power:
            share = found.share_of_budget
            raise WrongResultError(
                f"{variant}, {shape.kind}: {share:.3g} times the allowed error against {found.against}"
            )

    def _cell(self, shape: Shape, variants: list[Variant], allowance: float, profiled: bool) -> list[Row]:
        rows: list[Row] = []
        decodes = shape.kind == "decode"
        clock = self.cold if decodes else self.clock
        runs: dict[Variant, Run] = {}
        expected: dict[Variant, float] = {}
        checked: dict[Variant, Checked | None] = {}
        for variant in variants:
            verdict = self.checks[variant, replace(shape, tokens=0)]
            if isinstance(verdict, str):
                rows.append(Row(shape, variant, skipped=verdict))
                continue
            try:
                estimate = self._estimate(shape, variant)
                if estimate > self.left() - sum(expected.values()):
                    left = max(0, self.left() - sum(expected.values()))
                    raise UnavailableError(f"a run would take about {estimate:.3g} s, and {left:.0f} s are left")
                run = prepare(shape, variant)
                if self.device == "cuda" or decodes or estimate < WARM_RUN_S:
                    run()
                    estimate = clock(run)
            except (UnavailableError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
                rows.append(Row(shape, variant, skipped=reason(error)))
                continue
            runs[variant], expected[variant], checked[variant] = run, estimate, verdict
        repeats = max(self.repeats, DECODE_REPEATS) if decodes else self.repeats
        samples = interleaved(runs, repeats_within(allowance, expected, repeats), clock)
        for variant, times in samples.items():
            found = spread(times)
            self.seen[variant, replace(shape, tokens=0)] = (shape.tokens, found.median)
            parts = tuple(breakdown(runs[variant], self.device)) if profiled and variant.is_power else ()
            runs[variant] = _released
            peak = self._peak(shape, variant, found.median)
            rows.append(Row(shape, variant, found, checked=checked[variant], peak_bytes=peak, parts=parts))
        return rows

    def _estimate(self, shape: Shape, variant: Variant) -> float:
        """Return the seconds of a run, from the last context measured, or from a short one now."""
        needed = bytes_needed(shape, variant)
        if needed > memory_of(self.device) / 2:
            raise UnavailableError(f"it would take {needed / 1e9:.0f} GB")
        key = (variant, replace(shape, tokens=0))
        if key not in self.seen:
            tokens = min(shape.tokens, PROBE_TOKENS)
            run = prepare(replace(shape, tokens=tokens), variant)
            run()
            self.seen[key] = (tokens, self.clock(run))
        tokens, seconds = self.seen[key]
        return float(seconds * (shape.tokens / tokens) ** variant.cost_exponent(shape.kind))

    def _peak(self, shape: Shape, variant: Variant, seconds: float) -> int | None:
        if not self.memory or shape.kind == "decode" or seconds > min(MEMORY_RUN_S, self.left() / 4):
            return None
        return peak_bytes(shape, variant)


def repeats_within(allowance: float, expected: dict[Variant, float], most: int) -> dict[Variant, int]:
    """Return how often to run each: equally often within the allowance (at least once), then more of the cheap ones."""
    if not expected:
        return {}
    together = sum(expected.values())
    common = max(1, min(most, int(allowance / together)))
    spare = max(0.0, allowance - common * together) / len(expected)
    return {name: min(most, common + int(spare / seconds)) for name, seconds in expected.items()}


def bytes_needed(shape: Shape, variant: Variant) -> int:
    """Return a lower bound of what the run holds at once, for the one backend that holds all T^2 weights."""
    if variant.impl != "sdpa-math" or shape.kind == "decode":
        return 0
    held = {"forward": 3, "train": 5}[shape.kind]
    return held * 4 * shape.batch * shape.heads * shape.tokens**2


def memory_of(device: str) -> int:
    """Return the bytes of memory that are free (GPU) or available (CPU)."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reason(error: Exception) -> str:
    """Return the first line of an error, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 160 else f"{lines[0][:157]}..."


def _released() -> None:
    """Stand in for a run whose tensors are no longer needed."""
