"""Work for several processes of torch.distributed (gloo, on the CPU), and how a test runs it: with a time limit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from children import HUNG_S

START_METHOD = {"gloo": "forkserver", "nccl": "spawn"}
"""How processes start, by backend. A fork server imports torch once, which takes a process about 3 s of CPU time."""

PRELOADED = ("torch.distributed.fsdp", "powerplan.models.build", "powerplan.kernels.api")
"""What the fork server imports. The packages of powerplan by themselves import no torch."""


def run_in(count: int, work: Callable[[int, Path], None], folder: Path, backend: str = "gloo") -> None:
    """Call work(rank, folder) in `count` processes; raises what one of them raises, or TimeoutError after HUNG_S."""
    torch.multiprocessing.set_forkserver_preload([*PRELOADED])
    context = torch.multiprocessing.start_processes(
        _join, (count, work, folder, backend), nprocs=count, join=False, start_method=START_METHOD[backend]
    )
    end = time.monotonic() + HUNG_S
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__} took more than {HUNG_S:.0f} s")


def _join(rank: int, count: int, work: Callable[[int, Path], None], folder: Path, backend: str) -> None:
    gc.freeze()  # What the fork server has imported is not looked through again, in a copy for each process.
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    where = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group(backend, init_method=where, rank=rank, world_size=count)
    try:
        work(rank, folder)
    finally:
        torch.distributed.destroy_process_group()
