"""In-context learning at equal FLOPs: softmax, windows, linear, power and a balanced mix, trained side by side.

Usage: python examples/train_icl.py --out FOLDER [--preset laptop | tiny] [--tasks code,recall] ...
`code`: bytes of Python's standard library, loss by position in the context. `recall`: keys and values, accuracy by
distance. Sizes, states and FLOPs are powerplan's. The same command goes on where it was interrupted (docs/icl.md).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from icl.plots import curve_plot, pyplot
from icl.result import machine, result, table, task_record
from icl.run import Place, Run, interruptible, label, result_path, task_of
from icl.settings import TaskSettings, check_context, preset
from icl.tasks import Task
from icl.variants import MIXERS, Variant, variants
from powerplan.errors import InputError, MachineError, PowerplanError, allowed_values
from powerplan.output import write_whole
from powerplan.units import format_duration, parse_context, parse_count, parse_integer

TASKS = ("code", "recall")
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


@dataclass(frozen=True)
class Experiment:
    """One task with its settings and models, ready to run."""

    task: Task
    settings: TaskSettings
    models: tuple[Variant, ...]


@dataclass(frozen=True)
class Job:
    """One run, small enough to send to another process."""

    task: str
    settings: TaskSettings
    mixer: str
    seed: int
    match: str
    place: Place

    @property
    def name(self) -> str:
        return label(self.task, self.mixer, self.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    try:
        return _main(_options(arguments), start)
    except PowerplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def _main(options: argparse.Namespace, start: float) -> int:
    if options.plot:
        pyplot()  # before anything is trained
    asked = _asked(options)
    place = Place(_folder(options.out, asked), options.device, options.threads)
    experiments = [_experiment(name, settings, options) for name, settings in _settings(options).items()]
    jobs = [
        Job(item.task.name, item.settings, model.mixer, seed, options.match, place)
        for item in experiments
        for seed in range(options.seeds)
        for model in item.models
    ]
    waiting = [job for job in jobs if not result_path(place.out, job.name).exists()]
    _say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done")
    _run_all(waiting, options.jobs)
    records = []
    for item in experiments:
        own = [job for job in jobs if job.task == item.task.name]
        runs = [json.loads(result_path(place.out, job.name).read_text(encoding="utf-8")) for job in own]
        records.append(task_record(item.task, item.settings, options.match, item.models, runs))
    data = result(options.command, machine(options.device, options.threads, options.jobs), records)
    target = place.out / "icl.json"
    write_whole(str(target), f"{json.dumps(data, indent=1)}\n".encode(), True, "--out")
    for record in records:
        print(f"\n{record['task']}, context {record['settings']['context']:,}, {options.seeds} seeds, mean ± spread")
        print(table(record))
        if options.plot:
            write_whole(str(place.out / f"icl-{record['task']}.png"), curve_plot(record), True, "--out")
    _say(f"wrote {target} after {format_duration(time.monotonic() - start)}")
    return 0


def _experiment(name: str, settings: TaskSettings, options: argparse.Namespace) -> Experiment:
    task = task_of(name, settings)
    return Experiment(task, settings, variants(settings, options.mixers, task.vocabulary, name, options.match))


def _settings(options: argparse.Namespace) -> dict[str, TaskSettings]:
    chosen = preset(options.preset)
    changed = {name: getattr(options, name) for name in ("context", "batch", "steps", "flops")}
    return {name: chosen[name].changed(**changed) for name in options.tasks}


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the numbers of a run, as JSON has it."""
    chosen = {name: asdict(settings) for name, settings in _settings(options).items()}
    return {"preset": options.preset, "match": options.match, "device": options.device, "tasks": chosen}


def _folder(out: Path, asked: dict[str, Any]) -> Path:
    """Return the folder of the results, made where it is missing; raises InputError where it cannot be used."""
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}", "--out") from None
    if not os.access(out / "runs", os.W_OK):
        raise InputError(f"{out} cannot be written to", "--out")
    known = out / "settings.json"
    if known.exists():
        if json.loads(known.read_text(encoding="utf-8")) != asked:
            raise InputError(f"{out} holds runs of other settings; give another folder", "--out")
    else:
        write_whole(str(known), json.dumps(asked, indent=1).encode(), False, "--out")
    return out


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def work(job: Job) -> None:
    """Do one run from where it is."""
    if job.place.threads is not None:
        torch.set_num_threads(job.place.threads)
    task = task_of(job.task, job.settings)
    (variant,) = variants(job.settings, (job.mixer,), task.vocabulary, job.task, job.match)
    run = Run(task, variant, job.settings, job.seed, job.place)
    with interruptible() as stop:
        run.train(_say, stop)
    record = run.finish()
    last = next(value for value in reversed(record["values"]) if value is not None)
    rate = f"{record['tokens_per_s']:,.0f} tokens/s"
    _say(f"{run.name}: {run.step:,} steps, {last:.3f} {task.unit} in the last bin, {rate}")


def _worker(jobs: Sequence[Job], next_one: Synchronized[int]) -> None:
    """Do what nobody has begun, one job after another; `next_one` counts what was begun."""
    try:
        while True:
            with next_one.get_lock():
                index, next_one.value = next_one.value, next_one.value + 1
            if index >= len(jobs):
                return
            work(jobs[index])
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except PowerplanError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)


def _run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Run every job, `at_once` of them side by side in processes; when interrupted, raise once all have stopped."""
    if at_once == 1 or len(jobs) < 2:
        for job in jobs:
            work(job)
        return
    context = multiprocessing.get_context("spawn")
    next_one = context.Value("i", 0)
    workers = [context.Process(target=_worker, args=(jobs, next_one)) for _ in range(at_once)]
    for worker in workers:
        worker.start()
    left = list(workers)
    try:
        while left:
            wait([worker.sentinel for worker in left])
            for worker in [worker for worker in left if not worker.is_alive()]:
                left.remove(worker)
                if worker.exitcode == INTERRUPTED:
                    raise KeyboardInterrupt
                if worker.exitcode:
                    raise MachineError(f"a run ended with exit code {worker.exitcode}; what it said is above")
    finally:
        for worker in left:
            if worker.pid is not None and worker.is_alive():
                os.kill(worker.pid, signal.SIGINT)
        for worker in workers:
            worker.join()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="results, and what a later call goes on from")
    add("--preset", default="laptop", help="laptop (what docs/icl.md shows) or tiny (seconds)")
    add("--tasks", default=",".join(TASKS), metavar="LIST", help=f"of {', '.join(TASKS)}")
    add("--mixers", default=",".join(MIXERS), metavar="LIST", help=f"of {', '.join(MIXERS)}")
    add("--context", help="tokens, a power of two; 1k to 16k say something")
    add("--match", default="flops", help="flops: equal training FLOPs (default); tokens: equal tokens")
    add("--steps", help="optimiser steps of softmax attention; its FLOPs are the budget of all")
    add("--flops", help="that budget itself, 1e14")
    add("--batch", help="sequences in a step")
    add("--seeds", default="3", help="runs of each mixer")
    add("--device", default="cpu", help="cpu or cuda; bf16 autocast on the latter")
    add("--threads", help="of a run on a CPU; 1 with several --jobs")
    add("--jobs", default="1", help="runs at a time, in processes of their own")
    add("--plot", action="store_true", help="draw the curves into FOLDER, one figure for each task")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "examples/train_icl.py", *given])
    options.tasks = _names(options.tasks, TASKS, "--tasks")
    options.mixers = _names(options.mixers, MIXERS, "--mixers")
    _names(options.match, ("flops", "tokens"), "--match")
    options.context = None if options.context is None else check_context(parse_context(options.context, "--context"))
    options.flops = None if options.flops is None else parse_count(options.flops, "--flops")
    for name, high in (("steps", 10**7), ("batch", 4096), ("seeds", 100), ("threads", 1024), ("jobs", 64)):
        text = getattr(options, name)
        setattr(options, name, None if text is None else parse_integer(text, f"--{name}", 1, high))
    if options.steps is not None and options.flops is not None:
        raise InputError("--steps and --flops both say how long to train; give one")
    if options.flops is not None and options.match == "tokens":
        raise InputError("--flops cannot be matched by tokens; give --steps")
    if options.device not in ("cpu", "cuda"):
        raise InputError(
            f"{options.device!r} is not a device{allowed_values(options.device, ('cpu', 'cuda'))}", "--device"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("this machine has no CUDA device, or a torch without CUDA", "--device")
    if options.threads is None and options.jobs > 1:
        options.threads = 1
    return options


def _names(text: str, allowed: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the names of a list; raises InputError for one that is not allowed, or is there twice."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in allowed:
            raise InputError(f"{name!r} is not one{allowed_values(name, allowed)}", where)
        if names.count(name) > 1:
            raise InputError(f"{name} is named twice", where)
    return names


if __name__ == "__main__":
    sys.exit(main())
