"""Work for four processes: training runs of examples/train_icl.py that share sequences, and rows of the batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from icl.ranks import Ranks
from icl.run import Run, RunEnvironment, build_task
from icl.settings import PRESETS, TaskSettings
from icl.variants import variants

COUNT = 4
CASES: dict[str, tuple[str, str, int, int]] = {
    # mixer, task, ranks that share a sequence, context
    "sequences over 2, rows over 2": ("mix", "code", 2, 128),
    "rows over 4": ("window", "recall", 1, 64),
    # The first rank has statements alone, so that nothing of its tokens counts.
    "sequences over 4": ("power", "recall", 4, 64),
}


def settings_of(case: str) -> TaskSettings:
    _, task, _, context = CASES[case]
    return replace(PRESETS["tiny"][task], context=context, batch=4, held_out=10)


def begin(case: str, out: Path, ranks: Ranks | None = None) -> Run:
    mixer, task, _, _ = CASES[case]
    settings = settings_of(case)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    data = build_task(task, settings)
    (variant,) = variants(settings, (mixer,), data.vocabulary, task, "flops")
    return Run(data, variant, settings, 0, RunEnvironment(out, ranks=ranks))


def all_work(rank: int, folder: Path) -> None:
    found: dict[str, Any] = {}
    for case, (*_, sharing, _) in CASES.items():
        run = begin(case, folder / case, Ranks(sharing))
        run.train(lambda _: None)
        losses = run.losses
        record = run.finish()
        found[case] = {"losses": losses, "values": record["values"]}
    # One rank is told to stop, and all do after the same step.
    case = "sequences over 2, rows over 2"
    cut = begin(case, folder / "cut", Ranks(2))
    try:
        cut.train(lambda _: None, lambda: rank == 1 and cut.step == 3)
    except KeyboardInterrupt:
        found["stopped"] = cut.step
    torch.distributed.barrier()
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
