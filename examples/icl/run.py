"""One training run: one mixer, one seed. It continues from its checkpoint and writes one result file at the end."""

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
from icl.ranks import Ranks
from icl.recall import Recall
from icl.saved import read_checkpoint
from icl.settings import TaskSettings
from icl.tasks import Task
from icl.variants import Variant
from icl.weights import load_model, load_optimizer, whole
from powerplan.errors import InputError
from powerplan.models import Decoder, build_model
from powerplan.output import write_whole
from powerplan.units import format_duration

GPT2_HIDDEN_SIZE = 768
"""The hidden size that the first weights of powerplan.models are meant for."""

SAVE_SECONDS = 60.0
"""Seconds between checkpoints."""

REPORT_SECONDS = 30.0
"""Seconds between lines of progress."""


@dataclass(frozen=True)
class RunEnvironment:
    """Where and how a run computes. Nothing here changes its numbers, apart from rounding.

    Attributes:
        out: Folder of the results; runs write to its folder runs/.
        device: "cpu" or "cuda".
        threads: Threads of torch on a CPU. None stands for torch's default.
        save_seconds: Seconds between checkpoints.
        report_seconds: Seconds between lines of progress.
        ranks: The processes that do the run together; None for this one alone.
    """

    out: Path
    device: str = "cpu"
    threads: int | None = None
    save_seconds: float = SAVE_SECONDS
    report_seconds: float = REPORT_SECONDS
    ranks: Ranks | None = None


def build_task(name: str, settings: TaskSettings) -> Task:
    """Return the task with this name."""
    return Code(settings) if name == "code" else Recall(settings)


def run_name(task: str, mixer: str, seed: int) -> str:
    """Return the name of a run. Its files are named after it."""
    return f"{task}-{mixer}-{seed}"


def result_path(out: Path, name: str) -> Path:
    return out / "runs" / f"{name}.json"


def checkpoint_path(out: Path, name: str) -> Path:
    return out / "runs" / f"{name}.pt"


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C or SIGTERM came. Inside, neither interrupts a training step."""
    caught: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda signum, _: caught.append(signum)) for number in signals]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


class Run:
    """A model with its optimizer, the number of steps done, and their losses: everything that a checkpoint holds.

    There is no other state: batches depend on seed and step alone, and only the first weights are random. On a CPU with
    the same number of threads, an interrupted run ends with the same bits as one that was not. On a GPU, and with
    another number of ranks, the results differ by the order of sums.
    """

    def __init__(
        self, task: Task, variant: Variant, settings: TaskSettings, seed: int, environment: RunEnvironment
    ) -> None:
        self.task, self.variant, self.settings, self.seed = task, variant, settings, seed
        self.environment, self.ranks = environment, environment.ranks
        self.name = run_name(task.name, variant.mixer, seed)
        self.checkpoint = checkpoint_path(environment.out, self.name)
        torch.manual_seed(seed)
        self.model = build_model(variant.spec)
        scale_weights(self.model, settings.gain)
        self.model.to(environment.device)
        if self.ranks is not None:
            self.ranks.shard(self.model)
        self.optimizer = build_optimizer(self.model, settings, settings.rates[variant.mixer])
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    def train(self, report: Callable[[str], None], should_stop: Callable[[], bool] = lambda: False) -> None:
        """Train from the checkpoint, or from the start, to the last step, and save checkpoints on the way.

        Args:
            report: Called with lines of progress.
            should_stop: Called after every step. If it returns True, on any rank, the run saves a checkpoint and ends.

        Raises:
            KeyboardInterrupt: `should_stop` returned True.
        """
        self.load()
        report(f"{self.name}: {self.variant.steps:,} steps" + (f", from step {self.step:,} on" if self.step else ""))
        last_save = last_report = time.monotonic()
        while self.step < self.variant.steps:
            start = time.monotonic()
            self.train_step()
            now = time.monotonic()
            self.seconds += now - start
            if self._on_any_rank(should_stop()):
                self.save()
                raise KeyboardInterrupt
            if self._on_any_rank(now - last_save > self.environment.save_seconds):
                self.save()
                last_save = now
            if now - last_report > self.environment.report_seconds:
                report(self.progress())
                last_report = now
        self.save()

    def _on_any_rank(self, flag: bool) -> bool:
        return flag if self.ranks is None else self.ranks.any(flag)

    def train_step(self) -> None:
        """Train on the batch of the next step."""
        batch, plan = self.task.batch(self.seed, self.step), None
        targets = batch.scored.sum().item()
        if self.ranks is not None:
            batch, plan = self.ranks.own(batch), self.ranks.plan(self.settings.context)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rates[self.variant.mixer] * self.rate_share(self.step)
        with autocast(self.environment.device):
            logits = self.model(batch.tokens.to(self.environment.device), cp=plan)
        scored = batch.scored.to(logits.device)
        predicted = logits[scored].float(), batch.targets.to(logits.device)[scored]
        if self.ranks is None:
            loss = whole = F.cross_entropy(*predicted)
        else:
            # The loss is the sum of what ranks have of it, and their gradients become means over ranks.
            own = F.cross_entropy(*predicted, reduction="sum") / targets
            loss, whole = own * self.ranks.count, self.ranks.total(own.detach())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.losses.append(whole.item())
        self.step += 1

    def rate_share(self, step: int) -> float:
        """Return the learning rate of a step as a share of its peak: linear warm-up, then a cosine down to a tenth."""
        warmup = max(1, round(self.settings.warmup * self.variant.steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self.variant.steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    def save(self) -> None:
        """Write the checkpoint, which is the same with any number of ranks. All call it, and the first one writes."""
        state = {
            "model": whole(self.model.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        if self.ranks is not None and self.ranks.rank:
            return
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(str(self.checkpoint), buffer.getvalue(), True, "--out")

    def load(self) -> None:
        """Go on from the checkpoint, if there is one. Raises InputError where it is damaged; it stays where it is."""
        if not self.checkpoint.exists():
            return
        saved = read_checkpoint(self.checkpoint, self.environment.device, self.variant.steps)
        try:
            load_model(self.model, saved.model)
            load_optimizer(self.optimizer, saved.optimizer)
        except Exception:  # Of any class: the optimizer takes for granted what it is given.
            problem = "does not fit the model; move it away, and the run starts again"
            raise InputError(problem, str(self.checkpoint)) from None
        self.step, self.seconds, self.losses = saved.step, saved.seconds, saved.losses

    def tokens_per_s(self) -> float:
        return self.step * self.settings.batch * self.settings.context / self.seconds if self.seconds else 0.0

    def progress(self) -> str:
        """Return a line of progress: steps, mean loss of the last 20 steps, speed and time left."""
        recent = self.losses[-20:]
        left = self.seconds / self.step * (self.variant.steps - self.step)
        return (
            f"{self.name}: step {self.step:,} of {self.variant.steps:,}, loss {sum(recent) / len(recent):.3f} nats, "
            f"{self.tokens_per_s():,.0f} tokens/s, {format_duration(left)} left"
        )

    def finish(self) -> dict[str, Any]:
        """Evaluate the model and return the record of the run; the first rank writes it, and deletes the checkpoint."""
        record = {
            "task": self.task.name,
            "mixer": self.variant.mixer,
            "seed": self.seed,
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "tokens_per_s": round(self.tokens_per_s(), 1),
            "training_losses": [round(loss, 4) for loss in self.losses],
            "values": evaluate(self.model, self.task, self.settings, self.environment.device, self.ranks),
        }
        if self.ranks is not None and self.ranks.rank:
            return record
        path = result_path(self.environment.out, self.name)
        write_whole(str(path), json.dumps(record).encode(), True, "--out")
        self.checkpoint.unlink(missing_ok=True)
        return record


@torch.no_grad()
def scale_weights(model: Decoder, gain: float) -> None:
    """Multiply the matrices of all layers by `gain`, and by what a narrow model needs.

    `build_model` draws weights with the standard deviation of GPT-2, which suits a hidden size of GPT2_HIDDEN_SIZE. The
    factor sqrt(GPT2_HIDDEN_SIZE / hidden_size) gives the outputs of a narrower matrix the same size.
    """
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(gain * math.sqrt(GPT2_HIDDEN_SIZE / model.spec.hidden_size))


def build_optimizer(model: nn.Module, settings: TaskSettings, rate: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and none on vectors."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def autocast(device: str) -> AbstractContextManager[Any]:
    """Return autocast to bf16 for a GPU, and a context that does nothing for a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext()


@torch.no_grad()
def evaluate(
    model: Decoder, task: Task, settings: TaskSettings, device: str, ranks: Ranks | None = None
) -> list[float | None]:
    """Return the measure of the task on the held-out sequences, the mean of each bin of `bin_edges`."""
    tally = Tally(bin_edges(settings.context))
    held_out = task.held_out()
    starts = range(0, held_out.tokens.shape[0], settings.batch)
    for first, counts in ((start, True) for start in starts) if ranks is None else ranks.share(starts):
        part, plan = held_out.part(slice(first, first + settings.batch)), None
        if ranks is not None:
            part, plan = ranks.tokens(part), ranks.plan(settings.context)
        with autocast(device):
            logits = model(part.tokens.to(device), cp=plan).float().cpu()
        if not counts:
            continue
        values = measure_predictions(task.measure, logits, part.targets)
        tally.add(values[part.scored], part.curve_x[part.scored])
    if ranks is not None:
        tally.sums, tally.counts = ranks.total(tally.sums), ranks.total(tally.counts)
    return tally.means()


def measure_predictions(measure: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the measure of each prediction [B, T], from logits [B, T, V] and targets [B, T].

    measure: "loss" gives the cross entropy in bits; "accuracy" gives 1 where the largest logit is right, else 0.
    """
    if measure == "accuracy":
        return (logits.argmax(-1) == targets).float()
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") / math.log(2)
