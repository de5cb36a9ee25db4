"""Work for four processes: mixers with a recurrent state over several ranks, their convolutions and token shifts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_on_ranks import CountBytes, message
from kinds import MIXERS, STATES
from models_on_ranks import continued, curve, difference, model_of, through_a_cache
from msgspec.structs import replace
from shared_calls import GROUPS, UNEVEN
from torch import Tensor, nn

from powerplan.kernels import ContextParallel
from powerplan.mixers import GLA, KDA, RWKV7, Attention, DeltaNet, GatedDeltaNet, LogLinear, RetNet
from powerplan.models.mixers import build_mixer

HIDDEN, TOKENS, STEPS = 16, 41, 8

EVERY_WAY: dict[str, Any] = {
    "deltanet": DeltaNet(**STATES, conv_size=0),
    "gated_deltanet": GatedDeltaNet(**STATES | {"heads": 4}, key_heads=2),
    "kda": KDA(**STATES, gate_rank=3, conv_bias=True),
    "gla": GLA(**STATES, gate_rank=3),
    "retnet": RetNet(**STATES, conv_size=3, conv_bias=True),
}
RANKS: dict[str, Any] = {"decay_rank": 3, "rate_rank": 2, "gate_rank": 4}
KINDS: dict[str, Any] = EVERY_WAY | {
    "mamba1": MIXERS["mamba1"],
    "mamba2": MIXERS["mamba2, groups, biases"],
    "rwkv7": MIXERS["rwkv7"],
    "gsa": MIXERS["gsa, convolution"],
    "sse": MIXERS["sse, convolution"],
    "log_linear": LogLinear(heads=4, head_dim=3, state_dim=5, groups=2, chunk_size=8, max_levels=9),
}
"""The kinds that go all ways, and those of which some are enough: their exchanges are the same."""
ROUNDED = (*EVERY_WAY, "rwkv7", "gsa")
"""Kinds whose states are a large part of their outputs with the first weights, so that rounding shows."""
VALUES = (
    RWKV7(heads=4, head_dim=8, chunk_size=8, channel_mix=False, **RANKS),
    RWKV7(heads=2, head_dim=8, v_head_dim=16, chunk_size=8, value_rank=2, **RANKS),
)
"""Layers of one model: the second takes values of the first, and its FFN has a token shift."""
WINDOW = Attention(heads=2, head_dim=4, window=3)
HYBRID = (
    KINDS["gated_deltanet"],
    Attention(heads=4, kv_heads=2, head_dim=8),
    KINDS["mamba2"],
    RWKV7(heads=2, head_dim=8, chunk_size=8, **RANKS),
    RWKV7(heads=2, head_dim=8, chunk_size=8, value_rank=2, **RANKS),
)


@dataclass(frozen=True)
class Job:
    """One mixer over some ranks. lengths: of one sequence in each of two rows, or of packed ones in one row."""

    kind: str
    ranks: int
    layout: str = "contiguous"
    exchange: str = "gather"
    dtype: str = "float64"
    lengths: tuple[int, ...] = (TOKENS,)

    @property
    def name(self) -> str:
        return " ".join(map(str, (self.kind, self.ranks, self.layout, self.exchange, self.dtype, *self.lengths)))


WAYS = ("gather", "scan")
JOBS = [
    *(
        Job(kind, ranks, layout, way)
        for kind in EVERY_WAY
        for ranks in GROUPS
        for layout in ("contiguous", "zigzag", "uneven")
        for way in WAYS
    ),
    *(Job(kind, 4, "zigzag", way, lengths=(5, 1, 30, 5)) for kind in KINDS for way in WAYS),
    *(Job(kind, 4, "uneven", lengths=(2, 38, 1)) for kind in KINDS),
    # Fragments shorter than the convolutions, and ranks without tokens.
    *(Job(kind, 4, "zigzag", "scan", lengths=(tokens,)) for kind in KINDS for tokens in (1, 6, 9)),
    *(Job(kind, 3, "zigzag", way, dtype) for kind in EVERY_WAY for dtype in ("float32", "bfloat16") for way in WAYS),
    *(
        Job(kind, *setting)
        for kind in KINDS
        if kind not in EVERY_WAY
        for setting in (
            (2, "contiguous"),
            (2, "uneven", "scan"),
            (3, "uneven"),
            (4, "zigzag", "scan"),
            (3, "zigzag", "gather", "float32"),
            (3, "contiguous", "scan", "bfloat16"),
        )
    ),
]


def all_work(rank: int, folder: Path) -> None:
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    groups = {size: dist.new_group(list(ranks)) for size, ranks in GROUPS.items()}
    found: dict[str, Any] = {}
    for number, job in enumerate(JOBS):
        if rank in GROUPS[job.ranks]:
            found[str(number)] = beyond(job, groups[job.ranks])
    found["rounding"] = {kind: rounding(kind, groups[4]) for kind in ROUNDED}
    found["traffic"] = traffic(groups[4])
    found["rates alone"] = rates_alone(groups[4])
    found["continued"] = {kind: continued(model_of(mixer), "zigzag") for kind, mixer in KINDS.items()}
    found["continued"]["hybrid"] = continued(model_of(*HYBRID), [[(0, 30)], [], [(31, 32)], [(30, 31)]])
    found["continued"]["values"] = continued(model_of(*VALUES), [[(0, 30)], [], [(31, 32)], [(30, 31)]])
    found["values"] = [
        difference(model_of(*VALUES), layout) for layout in ("zigzag", [[(0, 1)], [], [(1, 2)], [(2, 32)]])
    ]
    found["through a cache"] = through_a_cache(*KINDS.values(), HYBRID[1])
    found["curve"] = curve(model_of(*HYBRID), STEPS)
    found["compiled"] = compiled(groups[2]) if rank in GROUPS[2] else None
    found["refusals"] = refusals(groups[4])
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def mixer_of(kind: str, dtype: str) -> nn.Module:
    """Return the module of a kind, its weights the same each time and in each dtype: rounded to bfloat16."""
    torch.manual_seed(1)
    module = build_mixer(KINDS[kind], HIDDEN, rope=None)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(weight.bfloat16())
    return module.to(getattr(torch, dtype))


def inputs_of(tokens: int, rows: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Return tokens [B, T, m] in numbers of bfloat16, and weights of a loss."""
    make = torch.Generator().manual_seed(tokens)
    x, weights = torch.randn(2, rows, tokens, HIDDEN, generator=make)
    return x.bfloat16().to(getattr(torch, dtype)), weights.to(getattr(torch, dtype))


@cache
def alone(kind: str, dtype: str, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the output and all gradients of one process, each sequence by itself."""
    module = mixer_of(kind, dtype)
    x, weights = inputs_of(sum(lengths), 2 if len(lengths) == 1 else 1, dtype)
    x.requires_grad_()
    out = torch.cat([module(part) for part in x.split(lengths, 1)], 1)
    (out * weights).sum().backward()
    return results(module, out, x.grad)


def results(module: nn.Module, out: Tensor, grad: Tensor | None) -> dict[str, Tensor]:
    assert grad is not None
    found = {"out": out.detach(), "gradient of x": grad}
    for name, weight in module.named_parameters():
        assert weight.grad is not None, f"{name} has no gradient"
        found[f"gradient of {name}"] = weight.grad
    return found


def on_ranks(job: Job, group: dist.ProcessGroup, **settings: Any) -> tuple[ContextParallel, dict[str, Tensor]]:
    """Return the plan, and what `alone` does, from a call in which each rank has its own tokens."""
    module, tokens = mixer_of(job.kind, job.dtype), sum(job.lengths)
    ends = torch.tensor([0, *job.lengths]).cumsum(0)
    sizes: dict[str, Any] = {"tokens": tokens} if len(job.lengths) == 1 else {"cu_seqlens": ends}
    layout: Any = UNEVEN[job.ranks] if job.layout == "uneven" else job.layout
    plan = ContextParallel(group, **sizes, layout=layout, exchange=job.exchange, **settings)
    x, weights = (plan.shard(part) for part in inputs_of(tokens, 2 if len(job.lengths) == 1 else 1, job.dtype))
    x.requires_grad_()
    out = module(x, cp=plan)
    (out * weights).sum().backward()
    for weight in module.parameters():
        if weight.grad is not None:
            dist.all_reduce(weight.grad, group=group)
    found = results(module, out, x.grad)
    return plan, {
        name: plan.unshard(part) if name in ("out", "gradient of x") else part for name, part in found.items()
    }


def beyond(job: Job, group: dist.ProcessGroup) -> dict[str, str]:
    """Return the results that differ from those of one process by more than is allowed, on the group's first rank.

    In float64 that is 1e-12 of the largest number. Else it is 8 times the error of one process, and 8 roundings of the
    largest number, since one process can be exact by luck.
    """
    plan, actual = on_ranks(job, group)
    if plan.rank:
        return {}
    exact, found = alone(job.kind, "float64", job.lengths), {}
    for name, value in exact.items():
        size, error = value.abs().max().item(), largest(actual[name], value)
        allowed = 1e-12 * size
        if job.dtype != "float64":
            one = alone(job.kind, job.dtype, job.lengths)[name]
            allowed = 8 * (largest(one, value) + torch.finfo(one.dtype).eps * size)
        if not error <= allowed:
            found[name] = f"error {error:.3g}, allowed {allowed:.3g}"
    return found


def largest(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()


def rounding(kind: str, group: dist.ProcessGroup) -> dict[str, float]:
    """Return the largest errors of an exchange in bfloat16, over the largest values, by the way and the result."""
    exact, found = alone(kind, "float64", (400,)), {}
    for way in WAYS:
        for wire in (None, torch.bfloat16):
            job = Job(kind, 4, "zigzag", way, "float32", (400,))
            _, actual = on_ranks(job, group, exchange_dtype=wire)
            for name in ("out", "gradient of x"):
                error = largest(actual[name], exact[name]) / exact[name].abs().max().item()
                found[f"{way} {'float32' if wire is None else 'bfloat16'} {name}"] = error
    return found


def planned(kind: str, plan: ContextParallel, backward: bool) -> dict[str, int]:
    """Return the bytes of a pass of two rows in float32: those of states, and those of last inputs."""
    transition, *state = states_of(kind, plan)
    settings: dict[str, Any] = {"p": 1, "normalize": False, "batch": 2, "backward": backward, "transition": transition}
    tokens, channels = inputs_before(kind)
    return {
        "states": plan.exchanged_bytes(*state, **settings),
        "inputs": plan.halo(tokens).sent_bytes(channels, 4, batch=2, backward=backward),
    }


def states_of(kind: str, plan: ContextParallel) -> tuple[Any, ...]:
    """Return the transition of a kind, and the heads, features of keys and values that its states are those of."""
    mixer = KINDS[kind]
    if kind == "mamba1":
        return "feature", mixer.inner_size, mixer.state_dim, 1
    if kind == "mamba2":
        return "head", mixer.heads, mixer.state_dim, mixer.head_dim
    if kind == "log_linear":
        return "matrix", mixer.heads, plan.layout.tokens.bit_length(), mixer.state_dim * mixer.head_dim
    if kind == "gsa":
        return "feature", mixer.heads, mixer.slots, mixer.head_dim + mixer.v_head_dim
    heads = mixer.heads * (1 + mixer.partitions if kind == "sse" else 1)
    transition = {"gla": "feature", "sse": "feature", "retnet": "head"}.get(kind, "matrix")
    return transition, heads, mixer.head_dim, mixer.v_head_dim


def inputs_before(kind: str) -> tuple[int, int]:
    """Return how many tokens before its own a mixer of this kind sees, and the features of each."""
    mixer = KINDS[kind]
    if kind == "rwkv7":
        return 1, HIDDEN
    if kind == "mamba1":
        channels = mixer.inner_size
    elif kind in ("mamba2", "log_linear"):
        channels = mixer.inner_size + 2 * mixer.groups * mixer.state_dim
    else:
        keys = getattr(mixer, "key_heads", mixer.heads)
        channels = 2 * keys * mixer.head_dim + mixer.heads * mixer.v_head_dim
    return max(mixer.conv_size - 1, 0), channels


def traffic(group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Return the bytes that this rank sent, forward and backward, and those that the plan says."""
    found = []
    for kind in KINDS:
        module = mixer_of(kind, "float32")
        for layout, way, wire, tokens in (
            ("contiguous", "gather", None, 40),
            ("contiguous", "gather", None, 80),
            *([("zigzag", "scan", torch.bfloat16, 64)] if kind in ROUNDED else ()),
        ):
            plan = ContextParallel(group, tokens=tokens, layout=layout, exchange=way, exchange_dtype=wire)
            x = plan.shard(inputs_of(tokens, 2, "float32")[0]).requires_grad_()
            module(x, cp=plan).sum().backward()  # compares arguments, once
            row: dict[str, Any] = {"kind": kind, "what": f"{layout} {way} {wire}", "tokens": tokens}
            with CountBytes() as count:
                loss = module(x, cp=plan).sum()
            row["forward"] = count.bytes
            with CountBytes() as count:
                loss.backward()
            row["backward"] = count.bytes
            row["planned"] = {name: planned(kind, plan, name == "backward") for name in ("forward", "backward")}
            found.append(row)
    return found


def rates_alone(group: dist.ProcessGroup) -> float:
    """Return the error of the gradient of the rates of mamba1 where no other weight has one: they are no token's."""
    plan, found = ContextParallel(group, tokens=TOKENS, layout=UNEVEN[4]), []
    for own in (plan, None):
        module = mixer_of("mamba1", "float64").requires_grad_(False)
        rates: Any = module.a_log
        rates.requires_grad_()
        x, weights = inputs_of(TOKENS, 2, "float64")
        out = module(x) * weights if own is None else module(own.shard(x), cp=own) * own.shard(weights)
        out.sum().backward()
        if own is not None:
            dist.all_reduce(rates.grad, group=group)
        found.append(rates.grad)
    return largest(*found) / found[1].abs().max().item()


def compiled(group: dist.ProcessGroup) -> dict[str, bool]:
    """Return whether compiled mixers give the same outputs and gradients, as the first call with a plan."""
    found, x = {}, inputs_of(TOKENS, 2, "float64")[0]
    for name, mixer in {"gated_deltanet": KINDS["gated_deltanet"], "window": WINDOW}.items():
        module = build_mixer(mixer, HIDDEN, rope=None, dtype=torch.float64)
        made = []
        for call in (torch.compile(module, backend="eager"), module):
            plan = ContextParallel(group, tokens=TOKENS)
            out = call(plan.shard(x), cp=plan)
            made.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
        found[name] = all(torch.equal(one, two) for one, two in zip(*made, strict=True))
    return found


def refusals(group: dist.ProcessGroup) -> dict[str, str]:
    rank, one = dist.get_rank(group), ContextParallel(group, tokens=40)
    packed = ContextParallel(group, cu_seqlens=[0, 20, 40])

    def call(kind: str = "deltanet", tokens: int = 10, rows: int = 2, plan: ContextParallel | None = None) -> object:
        plan = ContextParallel(group, tokens=40) if plan is None else plan
        return mixer_of(kind, "float32")(torch.ones(rows, tokens, HIDDEN), cp=plan)

    def tangent() -> object:
        module, x = mixer_of("deltanet", "float32"), torch.ones(2, 10, HIDDEN)
        return torch.func.jvp(lambda x: module(x, cp=one), (x,), (x,))

    calls: dict[str, Callable[[], object]] = {
        "kinds": lambda: call("deltanet" if rank < 2 else "gla"),
        "rows": lambda: call(rows=1 + rank % 2),
        "tokens": lambda: call(tokens=9 if rank == 1 else 10),
        "convolved": lambda: call("kda", tokens=9 if rank == 1 else 10),
        "packed": lambda: call(plan=packed),
        "levels": lambda: build_mixer(replace(KINDS["log_linear"], max_levels=4), HIDDEN, rope=None)(
            torch.ones(2, 10, HIDDEN), cp=one
        ),
        "forward mode": tangent,
        "transition": lambda: one.exchanged_bytes(1, 4, transition="vector"),
    }
    return {name: message(one) for name, one in calls.items()}
