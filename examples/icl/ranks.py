"""The processes that torchrun has started, which train one model together.

They stand in groups. A group has some of the sequences of a batch, and its ranks have parts of each of them
(docs/distributed.md). FSDP2 shards weights, gradients and optimizer states over all ranks.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from icl.tasks import Batch
from powerplan.errors import InputError, MachineError
from powerplan.kernels import ContextParallel
from powerplan.models import Decoder


def started_ranks() -> int | None:
    """Return how many processes torchrun has started, or None where it has not started this one."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


def is_first() -> bool:
    """Return whether this process is the only one, or the first one: the one that reports and writes files."""
    return started_ranks() is None or os.environ["RANK"] == "0"


def command_line(arguments: Sequence[str], processes: int | None) -> str:
    """Return the command that runs the example with these arguments, by torchrun if it is to start `processes`."""
    here = processes if processes is None else int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    start = ["python"] if here is None or processes is None else ["torchrun", "--nproc-per-node", str(here)]
    if here is not None and processes is not None and here < processes:
        start += ["--nnodes", str(processes // here)]
    return shlex.join([*start, "examples/train_icl.py", *arguments])


def check_ranks(context_parallel: int, arguments: Sequence[str]) -> None:
    """Raise InputError unless the ranks that torchrun has started can share sequences by so many."""
    processes = started_ranks()
    if processes is None and context_parallel > 1:
        command = command_line(arguments, context_parallel)
        raise InputError(f"{context_parallel} ranks are started by torchrun: {command}", "--context-parallel")
    if processes is not None and processes % context_parallel:
        raise InputError(
            f"{context_parallel} does not divide the {processes} ranks that torchrun has started", "--context-parallel"
        )


class RankError(MachineError):
    """Another rank has failed, and its own message says why."""


class Ranks:
    """The ranks of the default process group, `context_parallel` of which share each sequence.

    Attributes:
        rank: This one.
        count: How many there are.
        group: Which group of `groups` this rank belongs to. Each group has as many of the sequences of a batch.
        groups: How many groups there are.
        device: Where this rank computes.
    """

    def __init__(self, context_parallel: int, device: str = "cpu") -> None:
        self.rank, self.count, self.device = dist.get_rank(), dist.get_world_size(), device
        self.groups = self.count // context_parallel
        kind, names = torch.device(device).type, ("groups", "context")
        self.mesh = init_device_mesh(kind, (self.groups, context_parallel), mesh_dim_names=names)
        self.everyone = init_device_mesh(kind, (self.count,))
        self.group = self.mesh["groups"].get_local_rank()
        self._plans: dict[int, ContextParallel] = {}

    def plan(self, tokens: int) -> ContextParallel:
        """Return how sequences of so many tokens lie on the ranks of this group."""
        if tokens not in self._plans:
            self._plans[tokens] = ContextParallel(self.mesh["context"], tokens=tokens)
        return self._plans[tokens]

    def tokens(self, batch: Batch) -> Batch:
        """Return this rank's tokens of all sequences."""
        plan = self.plan(batch.tokens.shape[1])
        return Batch(plan.shard(batch.tokens), plan.shard(batch.targets), plan.shard(batch.curve_x))

    def own(self, batch: Batch) -> Batch:
        """Return this rank's tokens of the sequences of its group."""
        rows = batch.tokens.shape[0] // self.groups
        return self.tokens(batch.part(slice(self.group * rows, (self.group + 1) * rows)))

    def shard(self, model: Decoder) -> None:
        """Shard a model, which is the same on all ranks, over all of them. Its gradients become means over ranks."""
        for layer in model.layers:
            fully_shard(layer, mesh=self.everyone)
        fully_shard(model, mesh=self.everyone)

    def share(self, starts: Sequence[int]) -> list[tuple[int, bool]]:
        """Return this group's share of `starts`, and whether each counts.

        A layer gathers its weights from all ranks, so that groups do equally many: one with fewer does its last again.
        """
        rounds = -(-len(starts) // self.groups)
        numbers = [self.group + turn * self.groups for turn in range(rounds)]
        return [(starts[min(number, len(starts) - 1)], number < len(starts)) for number in numbers]

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks. Raises RankError where one of them has ended."""
        summed = x.to(self.device, copy=True)
        try:
            dist.all_reduce(summed)
        except RuntimeError:
            raise RankError("another rank has failed; its own message says why") from None
        return summed.to(x.device)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank: the same on all of them."""
        return bool(self.total(torch.tensor(int(flag))))

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.any(False)


@contextmanager
def joined(context_parallel: int, device: str) -> Iterator[Ranks | None]:
    """Join the ranks that torchrun has started, and leave them at the end; None where it has not started this process.

    device: "cpu", or "cuda" for the GPU of this rank. Raises InputError where the machine has fewer GPUs than ranks.
    """
    if started_ranks() is None:
        yield None
        return
    if device != "cpu":
        here, gpus = os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
        if int(here) > gpus:
            raise InputError(f"torchrun has started {here} ranks on a machine with {gpus} GPUs", "--device")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield Ranks(context_parallel, device)
    finally:
        dist.destroy_process_group()
