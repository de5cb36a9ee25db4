"""What a profile has measured so far, what it could not measure, and the result that this makes."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

from powerplan.choices import Dtype
from powerplan.errors import printable
from powerplan.measured import SCHEMA, LayerPart, Measurement
from powerplan.profile.costs import run_costs
from powerplan.profile.machine import Machine, versions
from powerplan.profile.result import PASSES, Breakdown, CheckResult, Crossover, Missing, Profile, Split
from powerplan.profile.timing import Spread
from powerplan.profile.workload import Point, TimedMixer, Workload
from powerplan.units import json_number
from powerplan.version import __version__


@dataclass
class Record:
    """Measurements of one workload, in the order in which they were made; what is missing, and notes for the user."""

    workload: Workload
    rows: list[Measurement] = field(default_factory=list)
    checks: list[CheckResult] = field(default_factory=list)
    refused: set[TimedMixer] = field(default_factory=set)  # Mixers that cannot run here.
    crossovers: list[Crossover] = field(default_factory=list)
    breakdowns: list[Breakdown] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def able(self, mixers: Sequence[TimedMixer]) -> list[TimedMixer]:
        """Return those of `mixers` that can run here."""
        return [timed for timed in mixers if timed not in self.refused]

    def refuse(self, timed: TimedMixer, reason: str) -> None:
        self.refused.add(timed)
        self.miss(f"{timed.name} ({timed.impl})", reason)

    def miss(self, what: str, reason: str) -> None:
        self.missing.append(Missing(what=what, reason=printable(reason)))

    def miss_run(self, point: Point, name: str, reason: str, seconds: float | None = None) -> None:
        """Record that one run was not timed; `seconds` is its expected time, where it would have been too long."""
        part, direction, context = point.part, point.direction, point.context
        run = Missing(reason=reason, part=part, direction=direction, context=context, name=name, seconds=seconds)
        self.missing.append(run)

    def medians(self, timed: TimedMixer, pass_name: str) -> dict[int, float]:
        """Return the seconds that the mixer alone took in one pass, by context."""
        key = ("state", PASSES[pass_name], timed.name)
        return {row.context: row.ms_p50 / 1000 for row in self.rows if (row.part, row.direction, row.name) == key}

    def first_reason(self) -> str:
        """Return why there are no measurements: the first thing that is missing, and how many more are."""
        if not self.missing:
            return "no time was left"
        first, *others = self.missing
        count = f"{len(others)} other runs" if len(others) > 1 else "one other run"
        return f"{first.describe()} (and {count})" if others else first.describe()

    def add(self, machine: Machine, timed: TimedMixer, point: Point, times: Spread, peak_bytes: int | None) -> None:
        mixer, shape, workload = timed.mixer, timed.shape, self.workload
        flops = float(run_costs(workload, timed, point, executed=True)[0])
        counted_flops, moved_bytes = run_costs(workload, timed, point, executed=False)
        row = Measurement(
            name=timed.name,
            impl="torch" if point.part in ("projections", "ffn") else timed.impl,
            direction=point.direction,
            context=point.context,
            mixer=timed.text,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            p=mixer.degree,
            window=mixer.window_size,
            chunk_size=timed.chunk_size if point.part in ("state", "layer") else None,
            gated=timed.gated,
            batch=workload.batch,
            dtype=cast(Dtype, workload.dtype),
            part=cast(LayerPart, point.part),
            ms_p20=times.p20 * 1000,
            ms_p50=times.median * 1000,
            ms_p80=times.p80 * 1000,
            repeats=times.repeats,
            tokens_per_s=workload.batch * point.tokens / times.median,
            flops=flops,
            tflops=flops / times.median / 1e12,
            share_of_matmul=flops / times.median / machine.matmul_flops_per_s,
            predicted_ms=machine.peak.roofline_s(float(counted_flops), float(moved_bytes)) * 1000,
            peak_bytes=peak_bytes,
        )
        self.rows.append(row)

    def profile(self, machine: Machine, seconds: float) -> Profile:
        """Return the result; `seconds` is how long the whole profile took."""
        installed, workload, peak = versions(), self.workload, machine.peak
        return Profile(
            schema=SCHEMA,
            device=machine.name,
            torch=installed["torch"],
            triton=installed["triton"],
            date=datetime.now(UTC).date().isoformat(),
            powerplan=__version__,
            python=platform.python_version(),
            threads=machine.threads,
            layer=workload.layer_shape(),
            dtype=workload.dtype,
            batch=workload.batch,
            seconds=round(seconds, 1),
            matmul_flops_per_s=machine.matmul_flops_per_s,
            copy_bytes_per_s=machine.copy_bytes_per_s,
            peak_flops_per_s=json_number(peak.flops_per_s),
            bandwidth_bytes_per_s=json_number(peak.bytes_per_s),
            peak_of=peak.kind,
            results=self.rows,
            checks=tuple(self.checks),
            split=tuple(filter(None, map(self._split, self.rows))),
            crossover=tuple(self.crossovers),
            breakdown=tuple(self.breakdowns),
            missing=tuple(self.missing),
            notes=(*workload.notes, *self.notes),
            interrupted=self.interrupted,
        )

    def _split(self, state: Measurement) -> Split | None:
        """Return the time of the weight part and of the state part at one row; None where one of them was not timed."""
        workload = self.workload
        timed = next((timed for timed in workload.mixers if timed.name == state.name), None)
        if state.part != "state" or timed is None:
            return None
        same_pass = [row for row in self.rows if row.direction == state.direction]
        sharing = {other.name for other in workload.mixers if other.projection_key == timed.projection_key}
        projections = next((row for row in same_pass if row.part == "projections" and row.name in sharing), None)
        ffn = next((row for row in same_pass if row.part == "ffn"), None)
        if projections is None or (workload.ffn is not None and ffn is None):
            return None
        place = ("layer", state.name, state.context)
        weight_ms = [row.seconds_per_token * state.tokens * 1000 for row in (projections, ffn) if row is not None]
        pass_name = next(name for name, direction in PASSES.items() if direction == state.direction)
        projection_flops, ffn_flops, state_flops = (
            run_costs(workload, timed, Point(part, pass_name, state.context), executed=False)[0]
            for part in ("projections", "ffn", "state")
        )
        return Split(
            name=state.name,
            direction=state.direction,
            context=state.context,
            projections_ms=weight_ms[0],
            ffn_ms=weight_ms[1] if ffn is not None else None,
            state_ms=state.ms_p50,
            wsfr_time=sum(weight_ms) / state.ms_p50,
            wsfr_flops=float((projection_flops + ffn_flops) / state_flops),
            layer_ms=next((row.ms_p50 for row in same_pass if (row.part, row.name, row.context) == place), None),
        )
