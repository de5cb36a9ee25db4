"""One training run: a mixer, a seed. It goes on from its checkpoint, and ends in one file."""

from __future__ import annotations

import io
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from icl.code import Code
from icl.curves import Tally, bin_edges
from icl.recall import Recall
from icl.settings import TaskSettings
from icl.tasks import Task
from icl.variants import Variant
from powerplan.models import Decoder, build_model
from powerplan.output import write_whole
from powerplan.units import format_duration

WIDTH = 768
"""Hidden size that the standard deviation of powerplan.models' weights is for: GPT-2's."""

SAVE_S = 60.0
SAY_S = 30.0
"""Seconds between checkpoints, and between lines of progress."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a run computes, and where it keeps its files."""

    out: Path
    device: str = "cpu"
    threads: int | None = None
    save_s: float = SAVE_S
    say_s: float = SAY_S


def task_of(name: str, settings: TaskSettings) -> Task:
    """Return the task of that name."""
    return Code(settings) if name == "code" else Recall(settings)


def label(task: str, mixer: str, seed: int) -> str:
    """Return the name of a run, and of its files."""
    return f"{task}-{mixer}-{seed}"


def result_path(out: Path, name: str) -> Path:
    return out / "runs" / f"{name}.json"


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield what says whether Ctrl-C or SIGTERM came: inside, they do not break off a step in the middle."""
    caught: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda found, _: caught.append(found)) for number in signals]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


class Run:
    """A model with its optimiser, its step and its losses: all that a checkpoint holds.

    Batches follow from seed and step, and nothing is drawn at random but the weights, so there is no other state. On a
    CPU with as many threads, a run that was interrupted ends with the same bits; on a GPU within the order of its sums.
    """

    def __init__(self, task: Task, variant: Variant, settings: TaskSettings, seed: int, place: Place) -> None:
        self.task, self.variant, self.settings, self.seed, self.place = task, variant, settings, seed, place
        self.name = label(task.name, variant.mixer, seed)
        self.checkpoint = place.out / "runs" / f"{self.name}.pt"
        torch.manual_seed(seed)
        self.model = build_model(variant.spec)
        prepare(self.model, settings.gain)
        self.model.to(place.device)
        self.optimizer = optimizer(self.model, settings, settings.rates[variant.mixer])
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    def train(self, say: Say, stop: Callable[[], bool] = lambda: False) -> None:
        """Train up to the last step, and keep a checkpoint; raise KeyboardInterrupt after a step where `stop` says so.

        A run that ends otherwise before its last step has the checkpoint of at most SAVE_S ago.
        """
        self.load()
        say(f"{self.name}: {self.variant.steps:,} steps" + (f", from step {self.step:,} on" if self.step else ""))
        saved = said = time.monotonic()
        while self.step < self.variant.steps:
            before = time.monotonic()
            self.one_step()
            now = time.monotonic()
            self.seconds += now - before
            if stop():
                self.save()
                raise KeyboardInterrupt
            if now - saved > self.place.save_s:
                self.save()
                saved = now
            if now - said > self.place.say_s:
                say(self.progress())
                said = now
        self.save()

    def one_step(self) -> None:
        """Update the weights once."""
        batch = self.task.batch(self.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rates[self.variant.mixer] * self.schedule(self.step)
        with autocast(self.place.device):
            logits = self.model(batch.tokens.to(self.place.device))
        scored = batch.scored.to(logits.device)
        loss = F.cross_entropy(logits[scored].float(), batch.targets.to(logits.device)[scored])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.step += 1

    def schedule(self, step: int) -> float:
        """Return the share of the peak rate: linear warm-up, then a cosine down to a tenth."""
        warmup = max(1, round(self.settings.warmup * self.variant.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.variant.steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(str(self.checkpoint), buffer.getvalue(), True, "--out")

    def load(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.place.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    def tokens_per_s(self) -> float:
        return self.step * self.settings.batch * self.settings.context / self.seconds if self.seconds else 0.0

    def progress(self) -> str:
        recent = self.losses[-20:]
        left = self.seconds / self.step * (self.variant.steps - self.step)
        return (
            f"{self.name}: step {self.step:,} of {self.variant.steps:,}, loss {sum(recent) / len(recent):.3f} nats, "
            f"{self.tokens_per_s():,.0f} tokens/s, {format_duration(left)} left"
        )

    def finish(self) -> dict[str, Any]:
        """Return the record of a trained run, written as a whole; its checkpoint goes."""
        record = {
            "task": self.task.name,
            "mixer": self.variant.mixer,
            "seed": self.seed,
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "tokens_per_s": round(self.tokens_per_s(), 1),
            "training_losses": [round(loss, 4) for loss in self.losses],
            "values": evaluate(self.model, self.task, self.settings, self.place.device),
        }
        path = result_path(self.place.out, self.name)
        write_whole(str(path), json.dumps(record).encode(), True, "--out")
        self.checkpoint.unlink(missing_ok=True)
        return record


@torch.no_grad()
def prepare(model: Decoder, gain: float) -> None:
    """Fit the weights that `build_model` drew to a narrow model, times `gain`.

    They have GPT-2's standard deviation, for a width of WIDTH; matrices of layers get that of the same share of width.
    """
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(gain * math.sqrt(WIDTH / model.spec.hidden_size))


def optimizer(model: nn.Module, settings: TaskSettings, rate: float) -> torch.optim.AdamW:
    """Return AdamW, its decay on matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def autocast(device: str) -> AbstractContextManager[Any]:
    """bf16 on a GPU, nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext()


@torch.no_grad()
def evaluate(model: Decoder, task: Task, settings: TaskSettings, device: str) -> list[float | None]:
    """Return the task's measure on the held-out sequences, by bin."""
    tally = Tally(bin_edges(settings.context))
    held_out = task.held_out()
    for first in range(0, held_out.tokens.shape[0], settings.batch):
        part = held_out.part(slice(first, first + settings.batch))
        with autocast(device):
            logits = model(part.tokens.to(device)).float().cpu()
        values = measured(task.measure, logits, part.targets)
        tally.add(values[part.scored], part.place[part.scored])
    return tally.means()


def measured(measure: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Return [B, T] of logits [B, T, V] and targets [B, T]: bits of cross entropy, or whether the top is right."""
    if measure == "accuracy":
        return (logits.argmax(-1) == targets).float()
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") / math.log(2)
