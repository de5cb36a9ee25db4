"""Steps in processes of their own, each with a time limit: one that hangs or crashes takes nothing else with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED = 77
"""Exit status of a step that has nothing to do here; its last line says why."""

DEVICE_LOST = 78
"""Exit status of a step whose device answers no more: a new process can go on."""

GRACE_S = 2.0
"""Seconds that a step has to end after SIGTERM, before SIGKILL."""

TAIL_LINES = 25
"""Lines of a failed step's output that are printed; all of it is in its log."""

MAX_LINE = 180
"""Characters of a line that are printed."""


@dataclass(frozen=True)
class Step:
    """A step: a module that runs as a process, with its arguments.

    Attributes:
        name: As in `--only`.
        arguments: Of the Python interpreter.
        limit_s: The most seconds that it may take.
        shown: Whether each of its lines is printed at once, rather than the last one at its end.
        may_stop: Whether it is no failure that its limit stopped it: what it did until then counts.
        environment: Variables that it has beside those of this process.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    shown: bool = False
    may_stop: bool = False
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Done:
    """How a step ended: "passed", "failed", "stopped" (by its time limit) or "skipped"; and what it said last."""

    name: str
    ended: str
    seconds: float
    limit_s: float
    said: str
    exit_status: int

    @property
    def line(self) -> str:
        return f"{self.name}: {self.ended} after {self.seconds:.1f} of {self.limit_s:.0f} s: {self.said}"


Say = Callable[[str], None]

_running: set[subprocess.Popen[str]] = set()


def run_together(steps: Sequence[Step], logs: Path, say: Say) -> list[Done]:
    """Run steps at the same time, and return how each ended, in their order. Each writes `logs`/NAME.log."""
    found: dict[str, Done] = {}

    def run(step: Step) -> None:
        found[step.name] = run_step(step, logs, say)

    threads = [threading.Thread(target=run, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[step.name] for step in steps]


def run_step(step: Step, logs: Path, say: Say) -> Done:
    """Run one step and return how it ended. Its processes are ended with it."""
    start = time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    process = subprocess.Popen(
        [sys.executable, *step.arguments],
        env=os.environ | dict(step.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        process_group=0,
        text=True,
        errors="replace",
    )

    _running.add(process)

    def read() -> None:
        assert process.stdout is not None
        with process.stdout, (logs / f"{step.name}.log").open("a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.strip():
                    lines.append(line.rstrip()[:MAX_LINE])
                    if step.shown:
                        say(lines[-1])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    stopped = False
    try:
        process.wait(timeout=step.limit_s)
    except subprocess.TimeoutExpired:
        stopped = True
    finally:
        _end_group(process)
        _running.discard(process)
    reader.join(timeout=GRACE_S)
    ended = "stopped" if stopped else {0: "passed", SKIPPED: "skipped"}.get(process.returncode, "failed")
    said = lines[-1] if lines else "it said nothing"
    done = Done(step.name, ended, time.monotonic() - start, step.limit_s, said, process.returncode)
    if (ended == "failed" or (stopped and not step.may_stop)) and not step.shown:
        for line in lines[-TAIL_LINES:]:
            say(f"  {line}")
    say(done.line)
    return done


def end_all() -> None:
    """End all steps that run, for a run that is told to end itself."""
    for process in tuple(_running):
        _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a step's process and all that it started, which are a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.1)  # For the rest of the group, which has the same signal.
    process.wait()


def failures(done: Sequence[Done], steps: Sequence[Step]) -> list[str]:
    """Return the names of the steps that failed, or were stopped and may not be."""
    allowed = {step.name for step in steps if step.may_stop}
    return [
        step.name for step in done if step.ended == "failed" or (step.ended == "stopped" and step.name not in allowed)
    ]
