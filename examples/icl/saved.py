"""Files of an experiment that are read again: settings, results of runs, checkpoints. A damaged one is named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import torch

from powerplan.errors import InputError


class RunRecord(msgspec.Struct, kw_only=True):
    """What `Run.finish` writes: training_losses of every step, values of every bin, None for an empty one."""

    task: str
    mixer: str
    seed: int
    steps: int
    seconds: float
    tokens_per_s: float
    training_losses: list[float]
    values: list[float | None]


class Checkpoint(msgspec.Struct, kw_only=True):
    """What `Run.save` writes."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    step: int
    seconds: float
    losses: list[float]


def read_json(path: Path, remedy: str) -> Any:
    """Return the data of a JSON file; raises InputError, which names `remedy`, where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", str(path)) from None
    except (ValueError, RecursionError):
        raise InputError(f"is damaged, not JSON; {remedy}", str(path)) from None


def read_record(path: Path, task: str, mixer: str, seed: int, steps: int, bins: int) -> dict[str, Any]:
    """Return the record of a run that is done. Raises InputError where the file is not of this run, or damaged."""
    remedy = "move it away, and the run is done again"
    data = read_json(path, remedy)
    try:
        record = msgspec.convert(data, RunRecord)
    except msgspec.ValidationError as error:
        raise InputError(f"is damaged: {error}; {remedy}", str(path)) from None
    expected = (task, mixer, seed, steps, steps, bins)
    found = (record.task, record.mixer, record.seed, record.steps, len(record.training_losses), len(record.values))
    if found != expected:
        raise InputError(f"holds another run, or half of one; {remedy}", str(path))
    kept: dict[str, Any] = data
    return kept


def read_checkpoint(path: Path, device: str, steps: int) -> Checkpoint:
    """Return a checkpoint of a run of `steps` steps. Raises InputError where it cannot be read, or is damaged."""
    remedy = "move it away, and the run starts again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", str(path)) from None
    try:
        data = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception:  # What torch raises on damaged bytes is of any class.
        raise InputError(f"is a damaged checkpoint; {remedy}", str(path)) from None
    try:
        checkpoint = msgspec.convert(data, Checkpoint)
    except msgspec.ValidationError as error:
        raise InputError(f"is a damaged checkpoint: {error}; {remedy}", str(path)) from None
    if not 0 <= checkpoint.step == len(checkpoint.losses) <= steps:
        raise InputError(f"is no checkpoint of this run of {steps:,} steps; {remedy}", str(path))
    return checkpoint
