"""Work for four processes: tokens before their fragments, with gradients and bytes, held to those of whole tensors."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_on_ranks import CountBytes
from shared_calls import GROUPS, UNEVEN, device_of
from torch import Tensor

from powerplan.kernels import ContextParallel
from powerplan.kernels.distributed.halo import tokens_before

BOUNDS: dict[str, list[int]] = {"one": [0, 41], "packed": [0, 5, 6, 33, 41]}
TOKENS = (0, 1, 3, 7, 60)  # more than a fragment has, and than there are
CASES = [
    (ranks, layout, kind, tokens, dtype)
    for ranks in GROUPS
    for layout in ("contiguous", "zigzag", "uneven")
    for kind in BOUNDS
    for tokens in TOKENS
    for dtype in (("float32", "bfloat16") if tokens == 3 else ("float32",))
]


def all_work(rank: int, folder: Path) -> None:
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    device = device_of(rank)
    groups = {size: dist.new_group(list(ranks)) for size, ranks in GROUPS.items()}
    found: dict[str, Any] = {"cases": {}}
    for number, (ranks, *case) in enumerate(CASES):
        if rank in GROUPS[ranks]:
            found["cases"][str(number)] = differences(groups[ranks], ranks, *case, device)
    found["bytes"] = sent_bytes(groups[4], device)
    found["refusals"] = refusals(groups[4], device)
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def differences(
    group: dist.ProcessGroup, ranks: int, layout: str, kind: str, tokens: int, dtype: str, device: str
) -> list[str]:
    """Return what differs from the tokens of whole tensors, and from their gradients."""
    bounds = BOUNDS[kind]
    given: Any = UNEVEN[ranks] if layout == "uneven" else layout
    sizes: dict[str, Any] = {"tokens": bounds[-1]} if kind == "one" else {"cu_seqlens": bounds}
    plan = ContextParallel(group, layout=given, **sizes)
    rows = 2 if kind == "one" else 1
    make = torch.Generator().manual_seed(3)
    shapes = [(rows, bounds[-1], 2, 3), (rows, bounds[-1], 5)]
    # Small integers: sums of gradients are exact in every dtype.
    whole = [torch.randint(-4, 5, shape, generator=make).to(device, getattr(torch, dtype)) for shape in shapes]
    # Each rank weighs the tokens that it has, and those before them, with numbers of its own.
    weights = [torch.randint(-4, 5, (ranks, *x.shape), generator=make).to(x) for x in whole]
    own = [plan.shard(x).clone().requires_grad_() for x in whole]
    halo, same, before = tokens_before(plan, tokens, *own)

    ids = [wanted(plan, rank, tokens, bounds) for rank in range(ranks)]
    found = []
    if halo.lengths != [len(fragment) for fragment in ids[plan.rank]]:
        found.append(f"lengths {halo.lengths}")
    flat = [torch.tensor(list(chain(*each)), dtype=torch.int64, device=device) for each in ids]
    losses = [
        (mine * plan.shard(weight[plan.rank])).sum() + (back * weight[plan.rank][:, flat[plan.rank]]).sum()
        for mine, back, weight in zip(same, before, weights, strict=True)
    ]
    grads = torch.autograd.grad(torch.stack(losses).sum(), own)
    for place, (x, weight) in enumerate(zip(whole, weights, strict=True)):
        expected = torch.zeros_like(x)
        for rank, ranges in enumerate(plan.layout.ranges):
            mine = torch.cat([torch.arange(*pair, device=device) for pair in ranges or [(0, 0)]])
            for index in (mine, flat[rank]):
                expected.index_add_(1, index, weight[rank][:, index])
        pairs = {
            "own": (same[place], plan.shard(x)),
            "before": (before[place], x[:, flat[plan.rank]]),
            "gradient": (grads[place], plan.shard(expected)),
        }
        found += [f"{what} of {place}" for what, (one, two) in pairs.items() if not torch.equal(one, two)]
    return found


def wanted(plan: ContextParallel, rank: int, tokens: int, bounds: list[int]) -> list[list[int]]:
    """Return the tokens before each range of a rank that has any, within their sequences, from the definition."""
    found = []
    for start, stop in plan.layout.ranges[rank]:
        if stop > start:
            first = bounds[bisect_right(bounds, start) - 1]
            found.append([one for one in range(start) if one >= first and one >= start - tokens])
    return found


def sent_bytes(group: dist.ProcessGroup, device: str) -> list[dict[str, Any]]:
    """Return the bytes that this rank sent, forward and backward, and those that the halo says."""
    found = []
    for layout in ("contiguous", "zigzag", "uneven"):
        for length in (41, 410):
            ranges: Any = UNEVEN[4] if layout == "uneven" else layout
            if layout == "uneven" and length > 41:
                continue
            plan = ContextParallel(group, tokens=length, layout=ranges)
            x = torch.ones(2, plan.local_tokens, 3, device=device, requires_grad=True)
            tokens_before(plan, 4, x)  # compares arguments, once
            with CountBytes() as count:
                halo, (same,), (before,) = tokens_before(plan, 4, x)
            row: dict[str, Any] = {"layout": layout, "tokens": length, "forward": count.bytes}
            loss = same.sum() + before.sum()
            with CountBytes() as count:
                loss.backward()
            row["backward"] = count.bytes
            row["planned forward"] = halo.sent_bytes(3, 4, batch=2)
            row["planned backward"] = halo.sent_bytes(3, 4, batch=2, backward=True)
            found.append(row)
    return found


def refusals(group: dist.ProcessGroup, device: str) -> dict[str, str]:
    plan = ContextParallel(group, tokens=40)
    rank = plan.rank
    x = torch.ones(1, 10, 3, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "tokens": lambda: tokens_before(ContextParallel(group, tokens=40), -1, x),
        "nothing": lambda: tokens_before(plan, 1),
        "dtype": lambda: tokens_before(ContextParallel(group, tokens=40), 1, x, x.double()),
        "rows": lambda: tokens_before(ContextParallel(group, tokens=40), 1, x, x.repeat(2, 1, 1)),
        "local tokens": lambda: tokens_before(ContextParallel(group, tokens=40), 1, x[:, rank // 3 :]),
        "differ": lambda: tokens_before(plan, 1 + rank // 3, x),
        "features": lambda: tokens_before(plan, 1, x[..., rank // 3 :]),
        "gradients": lambda: tokens_before(plan, 1, x.clone().requires_grad_(rank == 0)),
    }
    return {name: message(call) for name, call in calls.items()}


def message(call: Callable[[], Tensor]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"
