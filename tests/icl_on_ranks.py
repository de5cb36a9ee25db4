"""Work for four processes of torchrun: examples/train_icl.py, and runs of it that share sequences and batches."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from icl.ranks import Ranks
from icl.run import Run, RunEnvironment, build_task
from icl.settings import PRESETS
from icl.variants import variants
from train_icl import main

COUNT = 4
OPTIONS = ["--preset", "tiny", "--seeds", "1", "--tasks", "recall", "--mixers", "softmax,mix"]
"""Of the whole example, in which two ranks share each sequence, and two groups of ranks the batch."""

CASES: dict[str, tuple[str, int, int]] = {
    # mixer, ranks that share a sequence, context
    "rows over 4": ("window", 1, 64),
    # The first rank has statements alone, so that nothing of its tokens counts.
    "sequences over 4": ("power", 4, 64),
}
CUT = "power", 2, 128


def begin(mixer: str, context: int, out: Path, ranks: Ranks | None = None) -> Run:
    """Return a run of the task `recall`, with batches that four groups can share."""
    settings = replace(PRESETS["tiny"]["recall"], context=context, batch=4, held_out=10)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    task = build_task("recall", settings)
    (variant,) = variants(settings, (mixer,), task.vocabulary, task.name, "flops")
    return Run(task, variant, settings, 0, RunEnvironment(out, ranks=ranks))


def all_work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"code": main([*OPTIONS, "--context-parallel", "2", "--out", str(folder / "whole")])}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=COUNT)
    for case, (mixer, sharing, context) in CASES.items():
        run = begin(mixer, context, folder / case, Ranks(sharing))
        run.train(lambda _: None)
        found[case] = {"losses": run.losses, "values": run.finish()["values"]}
    # One rank is told to stop, and all do after the same step.
    mixer, sharing, context = CUT
    cut = begin(mixer, context, folder / "cut", Ranks(sharing))
    try:
        cut.train(lambda _: None, lambda: rank == 1 and cut.step == 3)
    except KeyboardInterrupt:
        found["stopped"] = cut.step
    if rank == 0:
        shutil.copytree(folder / "cut", folder / "resumed")
    dist.barrier()
    # Other ranks than those that began share its sequences now, and all share its weights.
    resumed = begin(mixer, context, folder / "resumed", Ranks(COUNT))
    resumed.train(lambda _: None)
    weights = resumed.model.state_dict().values()
    found["resumed"] = resumed.losses
    found["share"] = sum(one.to_local().numel() for one in weights) / sum(one.numel() for one in weights)
    dist.destroy_process_group()
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    all_work(int(os.environ["RANK"]), Path(sys.argv[1]))
