"""All that only a GPU can show, in four minutes: kernel tests, compute-sanitizer, speed against softmax attention.

Usage: python benchmarks/gpu.py [--only bench,tests] [--budget 240] [--out FILE.json] [--dry]     (make gpu)

Steps, each in processes of its own with a time limit; what one leaves goes to those after it:
    precompile  what the benchmark launches, in parallel, into Triton's cache
    tests       tests/kernels on the GPU, compiled, in bf16, fp16 and fp32
    sanitize    compute-sanitizer over two head dims: memcheck, racecheck   (beside the tests)
    bench       power attention checked against float64, then timed against SDPA: targets first
    others      FLA, the public power kernels, FlexAttention, where they are installed

--only runs some of them, in the order that it names, and --limits gives their seconds: what a run must be sure to have
comes first.

Rows are printed as they are measured, and the result (schema: support/gpu/results.py) is written after each, so that a
run that is stopped keeps what it has. The exit status is 1 where a step failed, however the targets were met.
--dry goes through the same steps on a CPU with the torch engine, in sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from support.gpu import targets
from support.gpu.results import ResultFile
from support.gpu.steps import DEVICE_LOST, Done, Step, end_all, failures, run_step, run_together

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("precompile", "tests", "sanitize", "bench", "others")

SHARES = {"machine": 0.12, "precompile": 0.25, "tests": 0.45, "sanitize": 0.45, "bench": 0.75, "others": 1.0}
"""The most of the time left that a step may take where --limits says nothing; the last step has all of it.

In the order of STEPS, of 240 s each has at least 28, 59, 79, 73 and 24. What runs beside the tests has their time.
"""

END_S = 4.0
"""Seconds kept for the end of the last step and the table."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _told_to_end)
    try:
        return _run(options, time.monotonic())
    finally:
        end_all()


def _told_to_end(*_: object) -> None:
    end_all()
    sys.exit(143)


def _run(options: argparse.Namespace, start: float) -> int:
    """Run the steps, print the targets, and return the exit status."""
    out: Path = options.out
    out.unlink(missing_ok=True)
    file, logs = ResultFile(out), out.parent / f"{out.stem}-logs"
    for log in logs.glob("*.log"):
        log.unlink()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ["PYTHONUNBUFFERED"] = "1"

    def limit(name: str) -> float:
        left: float = options.budget - END_S - (time.monotonic() - start)
        wanted: float = options.limits.get(name, left if name == options.only[-1] else SHARES[name] * left)
        return max(1.0, min(wanted, left))

    failed: list[str] = []
    steps = _Steps(options, file, logs)
    groups = _together(options.only)
    begin = ["machine"]
    if groups[0] == ["precompile"]:
        begin += groups.pop(0)
    failed += steps.run([steps.make(name, limit(name)) for name in begin])
    for names in groups if "machine" not in failed else ():
        if names == ["bench"]:
            failed += steps.bench(limit("bench"))
        else:
            failed += steps.run([steps.make(name, limit("tests" if len(names) > 1 else name)) for name in names])
    data = file.read()
    file.set(targets=targets.records(data), seconds=round(time.monotonic() - start, 1))
    print(f"\n{targets.table(file.read())}\n")
    for done in steps.done:
        print(done.line)
    print(f"{time.monotonic() - start:.0f} s in all, {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


class _Steps:
    """Makes steps from the options, runs them, and records how they ended."""

    def __init__(self, options: argparse.Namespace, file: ResultFile, logs: Path) -> None:
        self.options, self.file, self.logs = options, file, logs
        self.done: list[Done] = []

    def make(self, name: str, limit_s: float) -> Step:
        """Return one step. It is told a shorter limit than the one that stops it, where it keeps one itself."""
        out, limit = ("--out", str(self.options.out)), ("--limit", f"{max(1.0, limit_s - 2):.1f}")
        workers = ("--workers", str(self.options.workers))
        module, *given = {
            "machine": ("machine", *out),
            "precompile": ("precompile", *workers),
            "tests": ("suite", *workers),
            "sanitize": ("sanitize", *limit),
            "compile-others": ("others", "--compile", *limit),
            "bench": ("measure", *out, *limit),
            "others": ("others", *out, *limit),
        }[name]
        dry = ("--dry",) if self.options.dry else ()
        return Step(
            name,
            ("-m", f"support.gpu.{module}", *given, *dry),
            limit_s,
            shown=name in ("bench", "others"),
            may_stop=name in ("compile-others", "others"),
        )

    def run(self, steps: list[Step]) -> list[str]:
        """Run steps at the same time and return the names of those that failed."""
        done = run_together(steps, self.logs, _say)
        self._record(done)
        return failures(done, steps)

    def bench(self, limit_s: float) -> list[str]:
        """Run the benchmark, and again from the next cell where it lost the device, as long as there is time."""
        end = time.monotonic() + limit_s
        lost = False
        while True:
            step = self.make("bench", end - time.monotonic())
            done = run_step(step, self.logs, _say)
            self._record([done])
            if done.exit_status != DEVICE_LOST or end - time.monotonic() < 10:
                break
            lost = True
        return ["bench"] if lost else failures([done], [step])

    def _record(self, done: list[Done]) -> None:
        self.done += done
        self.file.add("steps", *(asdict(one) for one in done))


def _together(names: Sequence[str]) -> list[list[str]]:
    """Return the steps in groups that run one after another, each at the same time: what is timed runs alone.

    Beside the tests compute-sanitizer runs, and what others need is compiled.
    """
    groups: list[list[str]] = []
    for name in names:
        if name == "sanitize" and ["tests"] in groups:
            groups[groups.index(["tests"])].append(name)
        elif name == "tests" and ["sanitize"] in groups:
            groups[groups.index(["sanitize"])].insert(0, name)
        else:
            groups.append([name])
    for group in groups:
        if "tests" in group and ["others"] in groups[groups.index(group) :]:
            group.append("compile-others")
    return groups


def _say(line: str) -> None:
    print(line, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"
    add = parser.add_argument
    add("--only", type=_names, default=STEPS, metavar="LIST", help=f"of {', '.join(STEPS)}, in their order")
    add("--limits", type=_limits, default={}, metavar="NAME=SECONDS,...", help="for single steps")
    add("--budget", type=float, default=240, metavar="SECONDS", help="for everything")
    add("--out", type=Path, default=folder / "gpu.json", metavar="FILE", help="the result; logs go beside it")
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile or test")
    add("--dry", action="store_true", help="on a CPU, in tiny sizes")
    return parser.parse_args(arguments)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: allowed are {', '.join(STEPS)}")
    return names


def _limits(text: str) -> dict[str, float]:
    """Return the seconds of steps from "bench=90,tests=40"."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, seconds = part.partition("=")
        try:
            found[_names(name)[0]] = float(seconds)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part}: give a step and its seconds, such as bench=90") from None
    return found


if __name__ == "__main__":
    sys.exit(main())
