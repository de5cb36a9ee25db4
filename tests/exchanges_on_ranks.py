"""Work for four processes: what each kind of mixer sends to other ranks in a pass, counted on the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from kinds import LATENT, MIXERS, spec_of
from torch.utils._python_dispatch import TorchDispatchMode

from powerplan.kernels import ContextParallel
from powerplan.mixers import MLA
from powerplan.models import build_layer

COUNT = 4
ROWS = 2
SETTINGS = (
    ("gather", "contiguous", 32),
    ("scan", "contiguous", 64),
    ("gather", "zigzag", 64),
    ("scan", "zigzag", 32),
)
"""Exchanges, layouts and tokens of the cases."""
CASES: dict[str, Any] = MIXERS | {
    f"{name}, ungated": type(MIXERS[name])(**{"heads": 4, "kv_heads": 2, "head_dim": 6, "v_head_dim": 5} | extra)
    for name, extra in (("power", {"p": 2}), ("linear", {}))
}
LATENT_CASES = {
    "mla, gathered latents": MLA(**LATENT | {"heads": 4}),
    "mla, expanded latents": MLA(**LATENT | {"heads": 4, "kv_lora_rank": 20}),
}
CASES |= LATENT_CASES


class CountSent(TorchDispatchMode):
    """Counts the bytes that collectives and sends are given for others: a rank's own part of an all-to-all stays."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.bytes = dict.fromkeys(("gather", "all-to-all", "send"), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::") and "recv" not in name:
            if "allgather" in name:
                self.bytes["gather"] += _size(args[1])
            elif "alltoall" in name:
                sent, rows = args[1], args[4]
                row = prod(sent.shape[1:]) * sent.element_size()
                self.bytes["all-to-all"] += row * sum(count for rank, count in enumerate(rows) if rank != self.rank)
            else:
                assert name == "c10d::send", f"{name} is not counted"
                self.bytes["send"] += sum(map(_size, args[0]))
        return func(*args, **(kwargs or {}))


def _size(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def cases() -> Iterator[tuple[str, str, str, int]]:
    """Yield mixer, exchange, layout and tokens of each case; of further choices of a kind, two for each."""
    seen: set[str] = set()
    for name, mixer in CASES.items():
        for setting in SETTINGS[1:3] if mixer.kind in seen else SETTINGS:
            yield name, *setting
        seen.add(mixer.kind)


def all_work(rank: int, folder: Path) -> None:
    found = {"|".join(map(str, case)): sent(rank, *case) for case in cases()}
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def sent(rank: int, name: str, exchange: str, layout: str, tokens: int) -> list[dict[str, int]]:
    """Return the bytes that this rank sends forward and backward, by collective."""
    torch.manual_seed(0)
    module = build_layer(spec_of(CASES[name]))  # the FFN of rwkv7 has a token shift
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    plan = ContextParallel(tokens=tokens, exchange=exchange, layout=layout)
    x = torch.randn(ROWS, plan.local_tokens, 16, requires_grad=True)
    module(x, cp=plan).sum().backward()  # compares arguments, once
    forward, backward = CountSent(rank), CountSent(rank)
    with forward:
        out = module(x, cp=plan).sum()
    with backward:
        out.backward()
    return [forward.bytes, backward.bytes]
