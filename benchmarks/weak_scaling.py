"""A training step of power attention over 1 to 4 processes, each with as many tokens: what each of them takes.

Times are those of a process's own processor, so that more processes than cores take no longer; waiting is not in them.
Memory is what the process grew by. Both should not grow with the processes, as each does the same work, but for the
state that all but the last compute once more. Every run is checked first: its outputs are those of one process.
The exchange is then planned for up to 1,024 H100s, with the links of powerplan train.

Usage: python benchmarks/weak_scaling.py [--tokens 8192] [--heads 4] [--kv-heads 4] [--dim 64]
                                         [--repeats 3] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from powerplan.dims import spow_dim
from powerplan.hardware import find_device
from powerplan.kernels import ContextParallel, power_attention
from powerplan.kernels.distributed.exchange import Wire
from powerplan.kernels.distributed.layout import make_layout, named_ranges
from powerplan.run.links import all_gather_s, cluster_of, link_for, send_s

MEASURED = (1, 2, 3, 4)
PLANNED = (2, 4, 8, 16, 64, 256, 1024)


def shape_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"kv_heads": arguments.kv_heads, "head_dim": arguments.dim, "v_head_dim": arguments.dim}


def inputs(tokens: int, arguments: argparse.Namespace) -> list[Tensor]:
    """Return q, k, v and log_g of so many tokens, the same in each process."""
    make, kv_heads = torch.Generator().manual_seed(0), arguments.kv_heads
    heads = arguments.heads, kv_heads, kv_heads
    q, k, v = (torch.randn(1, tokens, count, arguments.dim, generator=make) for count in heads)
    return [q, k, v, -0.01 * torch.rand(1, tokens, kv_heads, generator=make)]


def work(rank: int, count: int, way: str, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    check(arguments, way)
    tokens = arguments.tokens * count
    plan = ContextParallel(tokens=tokens, exchange=way)
    # Each process makes its own tokens: a whole sequence would grow with the processes.
    own = [x.requires_grad_() for x in inputs(arguments.tokens, arguments)]
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(arguments.repeats + 1):
        begin = time.process_time()
        out = power_attention(*own, cp=plan)
        assert isinstance(out, Tensor)
        out.sum().backward()  # type: ignore[no-untyped-call]
        seconds.append(time.process_time() - begin)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sent = sum(plan.exchanged_bytes(**shape_of(arguments), backward=backward) for backward in (False, True))
    found = {"seconds": statistics.median(seconds[1:]), "memory_kib": grown, "sent_bytes": sent}
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def check(arguments: argparse.Namespace, way: str) -> None:
    """Raise where outputs of a shorter sequence are not those of one process."""
    whole = inputs(777, arguments)
    plan = ContextParallel(tokens=777, exchange=way)
    out = power_attention(*(plan.shard(x) for x in whole), cp=plan)
    alone = power_attention(*whole)
    assert isinstance(out, Tensor)
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(plan.unshard(out), alone, rtol=0, atol=1e-4 * alone.abs().max().item())


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for count in MEASURED:
        for way in ("gather", "scan"):
            with tempfile.TemporaryDirectory() as folder:
                arguments_of = (count, way, arguments, folder)
                torch.multiprocessing.spawn(work, arguments_of, nprocs=count)  # type: ignore[attr-defined,no-untyped-call]
                each = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
            row = {name: max(found[name] for found in each) for name in each[0]}
            rows.append({"ranks": count, "exchange": way, **row})
            line = f"{count:6}  {way:8}  {row['seconds']:8.2f} s  {row['memory_kib'] / 1024:8.0f} MiB"
            print(f"{line}  {row['sent_bytes'] / 2**20:8.2f} MiB", flush=True)
    return rows


def planned(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    device = find_device("h100-sxm")
    for count in PLANNED:
        layout = make_layout((0, 8 * count), named_ranges("contiguous", 8 * count, count))
        nobody: Any = None
        wire = Wire(nobody, 0, layout, "scan", None)
        size = (1, arguments.kv_heads, spow_dim(arguments.dim, 2), arguments.dim + 1)
        state = wire.message_bytes(size, True, torch.float32)
        link = link_for(cluster_of(device, count), count)
        gather, scan = all_gather_s(link, count, state * count), len(wire.rounds(False)) * send_s(link, state)
        rows.append({"ranks": count, "state_bytes": state, "gather_s": gather, "scan_s": scan})
        print(f"{count:6,}  {gather * 1e6:9,.0f} us  {scan * 1e6:9,.0f} us")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("heads", 4), ("kv-heads", 4), ("dim", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    heads = f"{arguments.heads} heads of {arguments.dim}, {arguments.kv_heads} key/value heads"
    print(f"{arguments.tokens:,} tokens a process, {heads}, p = 2, gated, fp32")
    print(" ranks  exchange   processor        memory          sent   a step, the largest of all ranks")
    rows = {"measured": measured(arguments)}
    print("\nplanned for H100s, a pass\n ranks         gather           scan")
    rows["planned"] = planned(arguments)
    if arguments.out is not None:
        settings = {"tokens": arguments.tokens, "heads": arguments.heads, **shape_of(arguments)}
        about = {"torch": torch.__version__, "machine": platform.machine(), "date": time.strftime("%Y-%m-%d")}
        arguments.out.write_text(json.dumps(about | settings | rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
