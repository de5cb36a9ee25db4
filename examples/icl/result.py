"""The result of an experiment: a JSON file with a versioned schema, and the table that is printed."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from fractions import Fraction
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from icl.curves import bin_edges, over_seeds
from icl.ranks import Ranks
from icl.saved import read_json
from icl.settings import TaskSettings
from icl.tasks import Task
from icl.variants import Variant
from powerplan.dump import spec_to_yaml
from powerplan.errors import InputError
from powerplan.mixers import Attention
from powerplan.swap.windows import same_state_window
from powerplan.training import train_flops
from powerplan.units import format_bytes, format_count, format_parameters, format_ratio, json_number
from powerplan.version import __version__

SCHEMA = "powerplan.icl/1"
"""Name and version of the JSON schema."""

TRAINING_POINTS = 50
"""Largest number of points of a training curve in a result. The files of the runs have every step."""


def machine(device: str, threads: int | None, jobs: int, ranks: Ranks | None = None) -> dict[str, Any]:
    """Describe the machine that the experiment runs on. Only with ranks it says how many there are."""
    together = {} if ranks is None else {"ranks": ranks.count, "context_parallel": ranks.count // ranks.groups}
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device), "threads": None, "jobs": jobs} | together
    name = f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "threads": threads or torch.get_num_threads(), "jobs": jobs} | together


def result(command: str, machine_record: Mapping[str, Any], tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole result as JSON data.

    Args:
        command: The command line.
        machine_record: What `machine` returned.
        tasks: The records of `task_record`. "seconds" is the sum over all their runs.
    """
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {"powerplan": __version__, "torch": version("torch")},
        "machine": dict(machine_record),
        "command": command,
        "seconds": round(sum(run["seconds"] for record in tasks for run in record["runs"]), 1),
        "tasks": list(tasks),
    }


def task_record(
    task: Task, settings: TaskSettings, match: str, models: Sequence[Variant], runs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return one task as JSON data: its settings, models and runs, and mean and spread over the seeds."""
    edges = bin_edges(settings.context)
    return {
        "task": task.name,
        "measure": task.measure,
        "unit": task.unit,
        "over": task.x_label,
        "bin_edges": edges,
        "match": match,
        "settings": asdict(settings),
        "data": task.describe(),
        "models": [model_record(variant) for variant in models],
        "runs": [run | {"training_losses": thinned(run["training_losses"])} for run in runs],
        "summary": [summary(variant.mixer, runs) for variant in models],
    }


def thinned(losses: Sequence[float]) -> list[float]:
    """Return the mean losses, in nats, of up to TRAINING_POINTS equal parts of a run."""
    count = min(TRAINING_POINTS, len(losses))
    cuts = [index * len(losses) // count for index in range(count + 1)]
    return [round(statistics.fmean(losses[start:stop]), 4) for start, stop in pairwise(cuts)]


def model_record(variant: Variant) -> dict[str, Any]:
    """Return one model as JSON data, by the accounting. FLOPs per token are means over the context."""
    row = variant.row
    mixers = [use.layer.mixer for use in variant.spec.layer_uses()]
    windows = [mixer.window for mixer in mixers if isinstance(mixer, Attention) and mixer.window is not None]
    return {
        "mixer": variant.mixer,
        "name": variant.spec.name,
        "layers": [f"{use.count} x {use.layer.describe()}" for use in variant.spec.layer_uses()],
        "window": windows[0] if windows else None,
        "equal_state_window": same_state_window(variant.spec),
        "parameters": variant.parameters,
        "state_elements": row.state_elements,
        "state_bytes": json_number(row.state_bytes),
        "weight_flops_per_token": row.weight_flops_per_token,
        "state_flops_per_token": json_number(row.state_flops_per_token),
        "wsfr": json_number(row.wsfr) if row.wsfr is not None else None,
        "train_flops_per_token": json_number(train_flops(row)),
        "steps": variant.steps,
        "tokens": variant.tokens,
        "total_flops": json_number(train_flops(row) * variant.tokens),
        "spec": spec_to_yaml(variant.spec),
    }


def summary(mixer: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and spread (sample standard deviation) over the seeds for each bin."""
    curves = [run["values"] for run in runs if run["mixer"] == mixer]
    points = over_seeds(curves)
    return {
        "mixer": mixer,
        "seeds": len(curves),
        "mean": [None if point is None else point[0] for point in points],
        "spread": [None if point is None else point[1] for point in points],
    }


def table(record: Mapping[str, Any], form: str = "simple") -> str:
    """Return the table of one task's models. form: a table format of tabulate."""
    first, end = record["bin_edges"][-2:]
    head = [
        "mixer",
        "parameters",
        "state",
        "WSFR",
        "FLOPs/token",
        "tokens",
        f"{record['unit']}, {first:,} to {end - 1:,}",
    ]
    rows = []
    for model, points in zip(record["models"], record["summary"], strict=True):
        rows.append(
            [
                model["mixer"] if model["window"] is None else f"{model['mixer']} {model['window']:,}",
                format_parameters(model["parameters"]),
                format_bytes(model["state_bytes"]),
                format_ratio(Fraction(model["wsfr"])),
                format_count(model["train_flops_per_token"]),
                format_count(model["tokens"]),
                "-" if points["mean"][-1] is None else f"{points['mean'][-1]:.3f} ± {points['spread'][-1]:.3f}",
            ]
        )
    return tabulate(rows, headers=head, tablefmt=form, disable_numparse=True)


def read(path: Path) -> dict[str, Any]:
    """Return a saved result. Raises InputError where the file is missing or holds something else."""
    data = read_json(path, "take another file")
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"is no result of {SCHEMA}", str(path))
    return data
