"""Train the same small model with five mixers at equal training FLOPs, and compare how well each uses its context.

Usage: python examples/train_icl.py --out FOLDER [--preset laptop | tiny] [--tasks code,recall] ...
       torchrun --nproc-per-node N examples/train_icl.py --context-parallel N --out FOLDER ...

The mixers are softmax attention, a sliding window, linear attention, power attention, and a mix of softmax and power
layers. The task `code` predicts bytes of Python's standard library and shows the loss by position in the context. The
task `recall` asks for the values of keys and shows the accuracy by distance. After an interruption the same command
continues where it stopped. docs/icl.md describes the experiment and its results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from script import imports

with imports():
    import torch

    from icl.curves import bin_edges
    from icl.plots import curve_plot, pyplot
    from icl.ranks import RankError, Ranks, check_ranks, command_line, is_first, joined, started_ranks
    from icl.result import machine, result, table, task_record
    from icl.run import Run, RunEnvironment, build_task, checkpoint_path, interruptible, result_path, run_name
    from icl.saved import read_checkpoint, read_json, read_record
    from icl.settings import TaskSettings, check_context, preset
    from icl.tasks import Task
    from icl.variants import MIXERS, Variant, variants
    from powerplan.errors import InputError, MachineError, PowerplanError, allowed_values
    from powerplan.output import check_target, write_whole
    from powerplan.units import format_duration, parse_context, parse_count, parse_integer

TASKS = ("code", "recall")
"""The tasks that --tasks takes."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells: 128 plus the number of the signal SIGINT."""


@dataclass(frozen=True)
class Experiment:
    """One task with its settings and the models to train on it."""

    task: Task
    settings: TaskSettings
    models: tuple[Variant, ...]


@dataclass(frozen=True)
class Job:
    """What another process needs to know to do one run."""

    task: str
    settings: TaskSettings
    mixer: str
    seed: int
    match: str
    environment: RunEnvironment

    @property
    def name(self) -> str:
        return run_name(self.task, self.mixer, self.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = None
    try:
        options = _options(arguments)
        with joined(options.context_parallel, options.device) as ranks:
            return _main(options, start, ranks)
    except PowerplanError as error:
        # All ranks have the same options, and all but one hear that a rank has failed.
        if is_first():
            print(f"error: {error}", file=sys.stderr)
        elif options is not None and not isinstance(error, RankError):
            print(f"rank {os.environ['RANK']}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _report("interrupted: the same command goes on from here")
        return INTERRUPTED


def _main(options: argparse.Namespace, start: float, ranks: Ranks | None) -> int:
    if options.plot:
        pyplot()  # before anything is trained
    if ranks is not None and not is_first():
        ranks.wait()  # The first rank says what is wrong for all.
    out = _prepare_folder(options.out, _run_settings(options)) if is_first() else options.out
    target = out / "icl.json"
    plots = {name: out / f"icl-{name}.png" for name in options.tasks if options.plot}
    for path in (target, *plots.values()):
        check_target(str(path), True, "--out")
    device = options.device if ranks is None else ranks.device
    environment = RunEnvironment(out, device, options.threads, ranks=ranks)
    experiments = [_experiment(name, settings, options) for name, settings in _settings(options).items()]
    jobs = [
        Job(experiment.task.name, experiment.settings, model.mixer, seed, options.match, environment)
        for experiment in experiments
        for seed in range(options.seeds)
        for model in experiment.models
    ]
    waiting = [job for job in jobs if not result_path(out, job.name).exists()]
    for experiment in experiments:
        _read_saved(experiment, [job for job in jobs if job.task == experiment.task.name])  # Before hours of training.
    if ranks is not None:
        _check_shared(experiments, ranks)
        if is_first():
            ranks.wait()
    _report(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done")
    run_jobs(waiting, options.jobs)
    if not is_first():
        return 0
    records = []
    for experiment in experiments:
        runs = _read_saved(experiment, [job for job in jobs if job.task == experiment.task.name])
        records.append(task_record(experiment.task, experiment.settings, options.match, experiment.models, runs))
    data = result(options.command, machine(device, options.threads, options.jobs, ranks), records)
    write_whole(str(target), f"{json.dumps(data, indent=1)}\n".encode(), True, "--out")
    for record in records:
        print(f"\n{record['task']}, context {record['settings']['context']:,}, {options.seeds} seeds, mean ± spread")
        print(table(record))
        if options.plot:
            write_whole(str(plots[record["task"]]), curve_plot(record), True, "--out")
    _report(f"wrote {target} after {format_duration(time.monotonic() - start)}")
    return 0


def _experiment(name: str, settings: TaskSettings, options: argparse.Namespace) -> Experiment:
    task = build_task(name, settings)
    return Experiment(task, settings, variants(settings, options.mixers, task.vocabulary, name, options.match))


def _check_shared(experiments: Sequence[Experiment], ranks: Ranks) -> None:
    """Raise InputError where groups of ranks cannot have equal parts of a batch."""
    for experiment in experiments:
        batch, name = experiment.settings.batch, experiment.task.name
        if batch % ranks.groups:
            raise InputError(
                f"{batch} sequences of {name} cannot be shared by {ranks.groups} groups of ranks", "--batch"
            )


def _read_saved(experiment: Experiment, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return the records of the jobs that are done. Raises InputError where a record or a checkpoint is damaged."""
    steps = {model.mixer: model.steps for model in experiment.models}
    bins = len(bin_edges(experiment.settings.context)) - 1
    records = []
    for job in jobs:
        path, checkpoint = (place(job.environment.out, job.name) for place in (result_path, checkpoint_path))
        if path.exists():
            records.append(read_record(path, job.task, job.mixer, job.seed, steps[job.mixer], bins))
        elif checkpoint.exists():
            read_checkpoint(checkpoint, "cpu", steps[job.mixer])
    return records


def _settings(options: argparse.Namespace) -> dict[str, TaskSettings]:
    by_task = preset(options.preset)
    changes = {name: getattr(options, name) for name in ("context", "batch", "steps", "flops")}
    return {name: by_task[name].changed(**changes) for name in options.tasks}


def _run_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return all settings that the numbers of a run depend on, as JSON data."""
    tasks = {name: asdict(settings) for name, settings in _settings(options).items()}
    return {"preset": options.preset, "match": options.match, "device": options.device, "tasks": tasks}


def _prepare_folder(out: Path, settings: dict[str, Any]) -> Path:
    """Make the folder of the results, with the settings in it, and return it.

    Raises InputError where the folder cannot be written to, or holds runs of other settings.
    """
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}", "--out") from None
    if not os.access(out / "runs", os.W_OK):
        raise InputError(f"{out} cannot be written to", "--out")
    saved = out / "settings.json"
    if saved.exists():
        if read_json(saved, "move it away if its runs are of these settings") != settings:
            raise InputError(f"{out} holds runs of other settings; give another folder", "--out")
    else:
        write_whole(str(saved), json.dumps(settings, indent=1).encode(), False, "--out")
    return out


def _report(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)


def run_job(job: Job) -> None:
    """Do one run, from its checkpoint if there is one."""
    if job.environment.threads is not None:
        torch.set_num_threads(job.environment.threads)
    task = build_task(job.task, job.settings)
    (variant,) = variants(job.settings, (job.mixer,), task.vocabulary, job.task, job.match)
    run = Run(task, variant, job.settings, job.seed, job.environment)
    with interruptible() as should_stop:
        run.train(_report, should_stop)
    record = run.finish()
    last = next(value for value in reversed(record["values"]) if value is not None)
    rate = f"{record['tokens_per_s']:,.0f} tokens/s"
    _report(f"{run.name}: {run.step:,} steps, {last:.3f} {task.unit} in the last bin, {rate}")


def _worker(jobs: Sequence[Job], next_index: Synchronized[int]) -> None:
    """Do one job after another that no process has begun. `next_index`, shared by all, is that of the next such job."""
    try:
        while True:
            with next_index.get_lock():
                index, next_index.value = next_index.value, next_index.value + 1
            if index >= len(jobs):
                return
            run_job(jobs[index])
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except PowerplanError as error:
        _report(f"error: {error}")
        sys.exit(error.exit_code)


def run_jobs(jobs: Sequence[Job], at_once: int) -> None:
    """Do all jobs, `at_once` of them at a time, each in a process of its own if that is more than one.

    Raises MachineError where a process fails, and KeyboardInterrupt after Ctrl-C, once all processes have stopped.
    """
    if at_once == 1 or len(jobs) < 2:
        for job in jobs:
            run_job(job)
        return
    context = multiprocessing.get_context("spawn")
    next_index = context.Value("i", 0)
    workers = [context.Process(target=_worker, args=(jobs, next_index)) for _ in range(at_once)]
    for worker in workers:
        worker.start()
    running = list(workers)
    try:
        while running:
            wait([worker.sentinel for worker in running])
            for worker in [worker for worker in running if not worker.is_alive()]:
                running.remove(worker)
                if worker.exitcode == INTERRUPTED:
                    raise KeyboardInterrupt
                if worker.exitcode:
                    raise MachineError(f"a run ended with exit code {worker.exitcode}; what it said is above")
    finally:
        for worker in running:
            if worker.pid is not None and worker.is_alive():
                os.kill(worker.pid, signal.SIGINT)
        for worker in workers:
            worker.join()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of results and checkpoints; made if it is missing",
    )
    add("--preset", default="laptop", help="laptop: the results of docs/icl.md; tiny: seconds, for a try")
    add("--tasks", default=",".join(TASKS), metavar="LIST", help=f"some of {', '.join(TASKS)}; all by default")
    add("--mixers", default=",".join(MIXERS), metavar="LIST", help=f"some of {', '.join(MIXERS)}; all by default")
    add("--context", help="tokens of a sequence, a power of two from 64 to 16k; by preset")
    add("--match", default="flops", help="what all mixers get the same amount of: training flops (default) or tokens")
    add("--steps", help="training steps of softmax attention; their FLOPs are the budget of every mixer")
    add("--flops", help="the budget of every mixer in FLOPs, such as 1e14, in place of --steps")
    add("--batch", help="sequences of a training step")
    add("--seeds", default="3", help="runs of each mixer, which differ in their random seed (default 3)")
    add("--device", default="cpu", help="cpu (default), or cuda with autocast to bf16")
    add("--threads", help="CPU threads of a run; 1 by default with several --jobs")
    add("--jobs", default="1", help="runs at the same time, each in a process of its own (default 1)")
    add(
        "--context-parallel",
        default="1",
        metavar="N",
        help="ranks of torchrun that share each sequence (default 1); groups of N ranks share the batch",
    )
    add("--plot", action="store_true", help="also draw the curves, one figure per task, in FOLDER")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = command_line(given, started_ranks())
    options.tasks = _names(options.tasks, TASKS, "--tasks")
    options.mixers = _names(options.mixers, MIXERS, "--mixers")
    _names(options.match, ("flops", "tokens"), "--match")
    options.context = None if options.context is None else check_context(parse_context(options.context, "--context"))
    options.flops = None if options.flops is None else parse_count(options.flops, "--flops")
    for name, high in (("steps", 10**7), ("batch", 4096), ("seeds", 100), ("threads", 1024), ("jobs", 64)):
        text = getattr(options, name)
        setattr(options, name, None if text is None else parse_integer(text, f"--{name}", 1, high))
    text = options.context_parallel
    options.context_parallel = parse_integer(text, "--context-parallel", 1, 1024)
    check_ranks(options.context_parallel, given)
    if options.jobs > 1 and started_ranks() is not None:
        raise InputError("the ranks of torchrun do one run at a time; leave it out", "--jobs")
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
    """Return the names in a comma-separated list. Raises InputError for an unknown or a repeated name."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in allowed:
            raise InputError(f"{name!r} is not one{allowed_values(name, allowed)}", where)
        if names.count(name) > 1:
            raise InputError(f"{name} is given twice", where)
    return names


if __name__ == "__main__":
    sys.exit(main())
