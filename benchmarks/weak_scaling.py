"""A training step over 1 to 4 processes that share a sequence, each with as many tokens; and planned to 1,024 H100s.

A small model with power attention (support/scaling.py) runs forward and backward. Times are those of a process's own
processor: more processes than cores take no longer, and waiting for others is not in them. Memory is what the process
grew by at its peak. Both are those of the rank that took most, the median of several starts. Outputs are held to those
of one process first. What is planned, for this model and for Llama 3 8B, comes from the planner of `powerplan train`.

Usage: python benchmarks/weak_scaling.py [--tokens 8192] [--runs 3] [--steps 3] [--out RESULT.json]
       python benchmarks/weak_scaling.py --result RESULT.json [--plan] --draw docs/images/weak-scaling.svg
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from powerplan.kernels import ContextParallel
from powerplan.mixers import Power
from powerplan.models import Decoder, build_model
from powerplan.plots.figure import figure_bytes, format_of
from support.files import write
from support.report import device_name
from support.scaling import FEW, planned, scaling_figure, small_model

SCHEMA = "powerplan.weak-scaling/1"


def work(rank: int, count: int, way: str, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.manual_seed(0)
    model = build_model(small_model())
    model.init_weights()
    check(model, way)
    tokens = options.tokens * count
    plan = ContextParallel(tokens=tokens, exchange=way)
    ids = torch.randint(model.spec.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(1))
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(options.steps + 1):
        model.zero_grad()
        begin = time.process_time()
        (model.loss(ids, plan).sum() / tokens).backward()
        seconds.append(time.process_time() - begin)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found = {"cpu_s": statistics.median(seconds[1:]), "memory_bytes": grown * 1024, "sent_bytes": sent(plan)}
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def sent(plan: ContextParallel) -> int:
    """Return the bytes that this rank hands over in a step: forward and backward, in all layers, which are alike."""
    spec = small_model()
    (mixer,) = spec.mixers()
    assert isinstance(mixer, Power)
    passes = [
        plan.exchanged_bytes(mixer.kv_heads, mixer.head_dim, p=mixer.p, gated=mixer.gated, backward=backward)
        for backward in (False, True)
    ]
    return spec.layer_count * sum(passes)


def check(model: Decoder, way: str) -> None:
    """Raise where the logits of a shorter sequence are not those of one process."""
    ids = torch.randint(model.spec.vocab_size, (1, 777), generator=torch.Generator().manual_seed(2))
    plan = ContextParallel(tokens=777, exchange=way)
    with torch.no_grad():
        alone, shared = model(ids), plan.unshard(model(plan.shard(ids), cp=plan))
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-4 * alone.abs().max().item())


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return time, memory and traffic of each number of ranks and each exchange, with those of all starts.

    They are started in turns, so that what else the machine does falls on all of them.
    """
    turns = [(count, way) for count in FEW for way in (("gather", "scan") if count > 1 else (None,))]
    starts: dict[tuple[int, str | None], list[dict[str, float]]] = {turn: [] for turn in turns}
    for count, way in options.runs * turns:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            given = (count, way or "gather", options, folder)
            torch.multiprocessing.spawn(work, given, nprocs=count)  # type: ignore[attr-defined,no-untyped-call]
            files = [Path(folder, f"{rank}.json") for rank in range(count)]
            each = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        most = {name: max(found[name] for found in each) for name in each[0]}
        starts[count, way].append(most | {"load": load})
        print(f"{count:6}  {way or 'none':8} {_figures(most)}", flush=True)
    rows = []
    print(f"\nmedians of {options.runs}")
    for (count, way), found in starts.items():
        row = {name: statistics.median(start[name] for start in found) for name in found[0]}
        rows.append({"ranks": count, "exchange": way, **row, "starts": found})
        print(f"{count:6}  {way or 'none':8} {_figures(row)}")
    return rows


def _figures(row: dict[str, float]) -> str:
    return f"{row['cpu_s']:8.2f} s  {row['memory_bytes'] / 2**20:8.0f} MiB  {row['sent_bytes'] / 2**20:8.2f} MiB"


def result(options: argparse.Namespace) -> dict[str, Any]:
    """Return the whole result: this machine and how busy it was, what was measured, and what is planned."""
    print(f"small model, {options.tokens:,} tokens a process, fp32: the rank that took most")
    print(" ranks  exchange  processor        memory   sent a step")
    rows = measured(options)
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name("cpu"),
        "tokens": options.tokens,
        "runs": options.runs,
        "steps": options.steps,
        "measured": rows,
        "planned": planned(options.tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("runs", 3), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="where the result is written")
    parser.add_argument("--result", type=Path, help="an earlier result: nothing is measured")
    parser.add_argument("--plan", action="store_true", help="plan again, and write that to --result")
    parser.add_argument("--draw", type=Path, help="where the figure is written")
    options = parser.parse_args()
    if options.result is None:
        data = result(options)
    else:
        data = json.loads(options.result.read_text(encoding="utf-8"))
        if options.plan:
            data["planned"] = planned(data["tokens"])
            write(data, options.result)
    if options.out is not None:
        write(data, options.out)
    if options.draw is not None:
        options.draw.write_bytes(figure_bytes(scaling_figure(data), format_of(str(options.draw))))


if __name__ == "__main__":
    main()
