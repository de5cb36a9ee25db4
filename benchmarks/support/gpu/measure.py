"""The step that times: checks power attention against float64, then takes each cell of the plan; rows as they come."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from powerplan.profile.timing import (
    FLUSH_BYTES,
    Clock,
    Run,
    clock_of,
    copy_rate,
    cpu_clock,
    interleaved,
    matmul_rate,
    spread,
)
from support.checks import Checked, compared
from support.gpu import targets
from support.gpu.plan import Cell, Plan, check_case, plan
from support.gpu.results import ResultFile
from support.gpu.roles import OTHER, launches, role_flops, role_records, roles_of
from support.gpu.steps import DEVICE_LOST
from support.gpu.untried import untried
from support.peers import prepare
from support.report import format_seconds
from support.rows import Row, with_ratios
from support.runner import reason, repeats_within
from support.shapes import DTYPES, Shape, Variant

CELL_S, DRY_CELL_S = 2.0, 0.01
"""Seconds for the repeats of a cell; in the dry mode, which has one repeat, or some of what takes microseconds."""

MOST_REPEATS = 25
"""Repeats after which more say nothing new."""

HOST_CALLS = 50
"""Calls whose host time is taken."""

CALLS_BEFORE_CAPTURE = 3
"""Calls on the capturing stream before a CUDA graph: the third repeats a tape, which is what is captured."""

QUEUED_FLUSHES = 12
"""Buffers of 256 MB written before a run on the device clock: 1 ms at 3 TB/s, in which the host gets ahead."""


class Measure:
    """Measures a plan into a result file until `limit_s` seconds have passed since the process began.

    Cells that the file has already are left out: after a lost device a new process goes on with the next.
    """

    def __init__(self, file: ResultFile, planned: Plan, limit_s: float, start: float) -> None:
        self.file, self.plan, self.end, self.start = file, planned, start + limit_s, start
        self.gpu = planned.device == "cuda"
        self.clock = clock_of(planned.device)
        self.wrong: dict[Variant, str] = {}
        self.checked: dict[tuple[Variant, int, str, bool], Checked | str] = {}
        self.failed: list[str] = []

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.start:6.1f} s  {line}", flush=True)

    def run(self) -> list[str]:
        """Measure all, and return what failed: results of power attention that are wrong, and errors."""
        self._rates()
        done = self._found()
        steps: list[tuple[str, Callable[[], None]]] = []
        decoding = [index for index, cell in enumerate(self.plan.cells) if cell.shape.kind == "decode"]
        for index, cell in enumerate(self.plan.cells):
            if index == decoding[0]:
                steps.append((self.plan.host.name, self._host))
            steps.append((cell.name, partial(self._cell, cell)))
            if index == decoding[-1]:
                steps += [(f"kernels of {one.name}", partial(self._kernels, one)) for one in self.plan.broken_down]
        for name, step in steps:
            if name in done or time.monotonic() > self.end:
                continue
            try:
                step()
            except Exception as error:  # Triton's errors have no base of their own, and the other cells can go on.
                self._fail(name, error)
            self.file.set(targets=targets.records(self.file.read()))
        left_out = [name for name, _ in steps if time.monotonic() > self.end and name not in self._found()]
        if left_out:
            self.say(f"no time was left for {len(left_out)} of {len(steps)}: {', '.join(left_out)[:300]}")
        return self.failed

    def _found(self) -> set[str]:
        data = self.file.read()
        found = {record["cell"] for name in ("rows", "host") for record in data[name]}
        return found | {f"kernels of {record['cell']}" for record in data["kernels"]}

    def _fail(self, name: str, error: Exception) -> None:
        """Record an error of power attention, and end the process where the device answers no more."""
        self.failed.append(f"{name}: {reason(error)}")
        self.say(self.failed[-1])
        if not self.gpu:
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            cell = next((cell for cell in self.plan.cells if cell.name == name), self.plan.host)
            shape, variant = cell.shape, cell.power
            lost = {"impl": variant.impl, "context": shape.tokens, "skipped": "the device was lost"}
            self.file.add("rows", {"cell": name} | lost)
            self.say("the device is lost: a new process goes on")
            sys.stdout.flush()
            os._exit(DEVICE_LOST)

    def _rates(self) -> None:
        machine = self.file.read().get("machine")
        if machine is None:
            dtype = torch.bfloat16 if self.gpu else torch.float32
            product, copy = (rate(self.plan.device) for rate in (self._product_of(dtype), self._copy))
            machine = {"matmul_flops_per_s": product, "copy_bytes_per_s": copy}
            self.file.set(machine=machine)
        self.matmul, self.copy = machine["matmul_flops_per_s"], machine["copy_bytes_per_s"]
        self.say(f"matrix product {self.matmul / 1e12:.4g} TFLOP/s, copy {self.copy / 1e9:,.0f} GB/s")

    def _product_of(self, dtype: torch.dtype) -> Callable[[str], float]:
        return lambda device: matmul_rate(device, dtype, self.clock)

    def _copy(self, device: str) -> float:
        return copy_rate(device, self.clock)

    def _check(self, shape: Shape, variant: Variant, untried: bool) -> Checked:
        """Return how far power attention is from float64 at this head dim. Raises ValueError where it is wrong."""
        key = (variant, shape.head_dim, shape.dtype, untried)
        if key not in self.checked:
            self.checked[key] = self._compare(shape, variant, untried)
        found = self.checked[key]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _compare(self, shape: Shape, variant: Variant, untried: bool) -> Checked | str:
        d, (case, chunk) = shape.head_dim, check_case(shape, variant)
        found = compared(case, variant, DTYPES[shape.dtype], shape.device, chunk, shape.device)
        name = " ".join([str(variant), *(["untried"] if untried else []), *(["fp16"] if shape.dtype == "fp16" else [])])
        record = {"variant": name, "head_dim": d, "passed": found.passed} | asdict(found)
        # JSON has no infinity, which stands for a value that is not finite.
        finite = found.share_of_budget if found.share_of_budget < float("inf") else None
        self.file.add("checks", record | {"share_of_budget": finite})
        text = f"{name} d{d}: {found.share_of_budget:.3g} of the allowed error, {found.against}"
        self.say(f"checked {text}")
        return found if found.passed else f"wrong, so it is not timed: {text}"

    def _cell(self, cell: Cell) -> None:
        with untried(cell.untried):
            self._compare_cell(cell)

    def _compare_cell(self, cell: Cell) -> None:
        shape = cell.shape
        clock: Clock = self._queued_clock() if cell.on_device else self.clock
        runs: dict[Variant, Run] = {}
        expected: dict[Variant, float] = {}
        rows: list[Row] = []
        checked: Checked | None = None
        for variant in cell.variants:
            try:
                if variant.is_power:
                    checked = self._check(shape, variant, cell.untried)
                run = prepare(shape, variant)
                run()
                if cell.captured and self.gpu:
                    run = _graph(run)
                    run()
                expected[variant], runs[variant] = clock(run), run
            except Exception as error:
                rows.append(Row(shape, variant, skipped=reason(error)))
                if variant.is_power:
                    self._fail(cell.name, error)
        samples = interleaved(runs, repeats_within(CELL_S if self.gpu else DRY_CELL_S, expected, MOST_REPEATS), clock)
        for variant, times in samples.items():
            rows.append(Row(shape, variant, spread(times), checked=checked if variant.is_power else None))
        runs.clear()
        self._record(cell, with_ratios(rows))
        if self.gpu:
            torch.cuda.empty_cache()

    def _queued_clock(self) -> Clock:
        """Return a clock of the device's time alone: work queued ahead keeps it busy while the host launches."""
        if not self.gpu:
            return cpu_clock
        flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

        def clock(run: Run) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            for _ in range(QUEUED_FLUSHES):
                flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000

        return clock

    def _record(self, cell: Cell, rows: list[Row]) -> None:
        clock = "device" if cell.on_device else "graph" if cell.captured else "call"
        marks = {"cell": cell.name, "clock": clock}
        self.file.add("rows", *(marks | row.as_json(self.matmul, self.copy) for row in rows))
        for row in rows:
            record = row.as_json(self.matmul, self.copy)
            found = row.skipped
            if row.time is not None:
                low, high = (format_seconds(value, like=row.time.median) for value in (row.time.p20, row.time.p80))
                found = f"{format_seconds(row.time.median):>8} ({low} - {high}, n {row.time.repeats})"
                if row.over_fastest_sdpa is not None:
                    found += f"  fastest SDPA / this {row.over_fastest_sdpa:.2f}"
                if "share_of_copy" in record:
                    found += f"  {record['share_of_copy']:.0%} of copy"
            self.say(f"{cell.name:30} {row.variant!s:24} {found}")
        contexts = [other for other in self.plan.cells if _is_crossover(other, cell)]
        if _is_crossover(cell, cell):
            data = self.file.read()
            others = [one for one in data["crossovers"] if one["head_dim"] != _head_dim(cell)]
            names = {other.name: other.shape.tokens for other in contexts}
            found_now = targets.crossover_record(data["rows"], _head_dim(cell), names)
            self.file.set(crossovers=[*others, found_now])

    def _host(self) -> None:
        """Take the host's time of a training call on an idle device: until it returns, and of all threads together."""
        cell = self.plan.host
        run = prepare(cell.shape, cell.power)
        for _ in range(5):
            run()
        walls: list[float] = []
        processors: list[float] = []
        for _ in range(HOST_CALLS):
            if self.gpu:
                torch.cuda.synchronize()
            wall, processor = time.perf_counter(), time.process_time()
            run()
            walls.append(time.perf_counter() - wall)
            processors.append(time.process_time() - processor)
        count = len(launches(run, self.plan.device))
        times, cpu = spread(walls), spread(processors)
        record = {"cell": cell.name, "seconds": asdict(times), "cpu_seconds": asdict(cpu), "launches": count}
        self.file.add("host", record)
        shown = f"{format_seconds(times.median)} until it returns, {format_seconds(cpu.median)} of CPU time"
        self.say(f"{cell.name}: {shown}, {count} launches")

    def _kernels(self, cell: Cell) -> None:
        """Take apart one training call: each launch, and each role as a share of the matrix product."""
        run = prepare(cell.shape, cell.power)
        run()
        found = launches(run, self.plan.device)
        roles = role_records(found, role_flops(cell.shape, cell.power), self.matmul, cell.name)
        placed = list(zip(found, roles_of(found), strict=True))
        self.file.add("kernels", *({"cell": cell.name, **asdict(launch), "role": role} for launch, role in placed))
        self.file.add("roles", *roles)
        # The longest, and not torch's fills and sums of microseconds.
        for launch, own in sorted(placed, key=lambda one: -one[0].seconds)[:20]:
            name = launch.kernel if len(launch.kernel) <= 40 else f"{launch.kernel[:37]}..."
            self.say(f"{cell.name}  {format_seconds(launch.seconds):>8}  {name} #{launch.index}: {own}")
        for role in roles:
            if role["role"] != OTHER:  # Its kernels have names of a line each.
                share = role["share_of_matmul"]
                shown = f"{format_seconds(role['seconds']):>8}"
                shown += "" if share is None else f", {share:.0%} of the matrix product"
                self.say(f"{cell.name}  {role['role']}: {shown} ({', '.join(role['kernels'])})")
        if self.gpu:
            torch.cuda.empty_cache()


def _head_dim(cell: Cell) -> int:
    """Return the head dim of a cell as its name has it; in the dry mode the shape's is smaller."""
    return int(cell.name.split(" d")[1].split()[0])


def _is_crossover(cell: Cell, like: Cell) -> bool:
    """Whether a cell is a training call of one sequence and eight heads, with the head dim of another."""
    alone = cell.name.startswith("train B1") and not cell.captured
    return alone and cell.power.p == 2 and _head_dim(cell) == _head_dim(like)


def _graph(run: Run) -> Run:
    """Return a run that replays what `run` does from a CUDA graph; both write to the same outputs each time."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # Autograd starts a backward pass on the stream of its forward pass, and the first calls on a new one allocate.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CALLS_BEFORE_CAPTURE):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True, help="seconds")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.dry:
        torch.set_num_threads(1)  # Threads wait for one another where tests run beside this.
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.filterwarnings("ignore", category=UserWarning, module="support")
    failed = Measure(ResultFile(options.out), plan(options.dry), options.limit, start).run()
    print("; ".join(failed)[:500] if failed else "all that was timed is right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
