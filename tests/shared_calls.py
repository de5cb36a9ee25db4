"""Calls of power attention over sequences that several processes share, held to the error budget of one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from device import DEVICE
from torch import Tensor

from powerplan.kernels import ContextParallel, PowerState, power_attention
from powerplan.kernels.testing import Case, beyond_budget, largest_error, plain, results, variants, widened

COUNT = 4
GROUPS = {2: (1, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)}
"""The processes of a group of each size: not the first ones, so that ranks of groups are not those of the world."""

CHUNK = 16
KIND = DEVICE.partition(":")[0]


@dataclass(frozen=True)
class Job:
    """One call on several ranks.

    cases: one batch of sequences of a length, or several sequences of one row each, which are packed.
    """

    cases: tuple[Case, ...]
    ranks: int = 4
    layout: Any = "contiguous"
    exchange: str = "gather"
    dtype: str = "float32"
    impl: str = "torch"
    started: bool = False
    exchange_dtype: str | None = None

    @property
    def name(self) -> str:
        kind = "packed" if len(self.cases) > 1 else "batch"
        tokens = "+".join(str(case.tokens) for case in self.cases)
        layout = self.layout if isinstance(self.layout, str) else "given"
        case = self.cases[0]
        odd = replace(Case(), tokens=case.tokens, batch=case.batch, seed=case.seed)
        changed = [f"{key}={value}" for key, value in vars(case).items() if value != getattr(odd, key)]
        words = [str(self.ranks), kind, tokens, layout, self.exchange, self.dtype, self.impl, *changed]
        return " ".join([*words, *(["started"] if self.started else [])])


def packed(*lengths: int, **settings: Any) -> tuple[Case, ...]:
    return tuple(Case(tokens=tokens, batch=1, seed=seed, **settings) for seed, tokens in enumerate(lengths))


SIMPLE = Case(tokens=41, with_state=True)
UNEVEN: dict[int, Any] = {
    2: [[(0, 40)], [(40, 41)]],
    3: [[(0, 5)], [], [(5, 41)]],
    4: [[(7, 20)], [(0, 7)], [], [(20, 40), (40, 41)]],
}
PACKED: dict[str, Any] = {
    "borders inside": packed(5, 30, 1, 20, with_state=True),
    "one over all": packed(3, 60, 2, with_state=True, gated=False),
    "all aligned": packed(8, 8, 8, 8),
}

JOBS = [
    *(
        Job((SIMPLE,), ranks, layout, way)
        for ranks in GROUPS
        for layout in ("contiguous", "zigzag", UNEVEN[ranks])
        for way in ("gather", "scan")
    ),
    *(
        Job(cases, ranks, layout, way)
        for cases in PACKED.values()
        for ranks in GROUPS
        for layout in ("contiguous", "zigzag")
        for way in ("gather", "scan")
    ),
    *(
        Job((case,), 3, "zigzag", "scan")
        for case in variants(SIMPLE, groups=[1], repeats=[1, 3], gated=[False], with_state=[False], gates=["resets"])
    ),
    *(
        Job((replace(SIMPLE, p=p, normalize=False, key_dim=5),), 4, "contiguous", way)
        for p in (1, 2, 3)
        for way in ("gather", "scan")
    ),
    Job((replace(SIMPLE, p=4, key_dim=4),), 3, "zigzag"),
    Job((replace(SIMPLE, tokens=3),), 4, "zigzag", "scan"),
    Job((replace(SIMPLE, tokens=1),), 2),
    *(
        Job((SIMPLE,), 4, layout, way, dtype)
        for dtype in ("bfloat16", "float64")
        for layout, way in (("contiguous", "gather"), ("zigzag", "scan"))
    ),
    Job(PACKED["borders inside"], 4, "zigzag", "scan", "bfloat16"),
    Job((replace(SIMPLE, tokens=20),), 2, impl="reference"),
    Job((replace(SIMPLE, tokens=20),), 2, "zigzag", impl="recurrent"),
    Job((replace(SIMPLE, tokens=20, batch=1),), 2, impl="triton"),
    Job(packed(5, 20, with_state=True), 2, "zigzag", impl="triton"),
    Job((SIMPLE,), 4, "contiguous", "gather", started=True),
    Job((SIMPLE,), 4, "zigzag", "scan", started=True),
]


def device_of(rank: int) -> str:
    return f"cuda:{rank}" if KIND == "cuda" else "cpu"


def made(job: Job, device: str) -> tuple[list[dict[str, Tensor | None]], dict[str, Tensor | None]]:
    """Return the inputs of each case, and those of the call: packed where there are several."""
    each = [case.inputs(getattr(torch, job.dtype), device) for case in job.cases]
    if len(each) == 1:
        return each, each[0]
    joined = {}
    for name, dim in (("q", 1), ("k", 1), ("v", 1), ("log_g", 1), ("kv", 0), ("key", 0)):
        parts = [x for inputs in each if (x := inputs[name]) is not None]
        joined[name] = torch.cat(parts, dim).detach() if parts else None
    return each, joined


def random_like(*parts: Tensor) -> list[Tensor]:
    """Return the weights that testing.results gives to output and state."""
    make = torch.Generator().manual_seed(1)
    sized = [torch.randn(part.shape, generator=make, dtype=torch.float64, device="cpu") for part in parts]
    return [weight.to(part.device) for weight, part in zip(sized, parts, strict=True)]


def call_on_ranks(job: Job, group: dist.ProcessGroup, device: str) -> tuple[ContextParallel, list[dict[str, Tensor]]]:
    """Return what testing.results does for each case, from a call in which each rank has its own tokens."""
    each, whole = made(job, device)
    is_packed = len(job.cases) > 1
    lengths = [case.tokens for case in job.cases]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    plan = ContextParallel(
        group,
        **({"cu_seqlens": bounds} if is_packed else {"tokens": lengths[0]}),
        layout=job.layout,
        exchange=job.exchange,
        exchange_dtype=None if job.exchange_dtype is None else getattr(torch, job.exchange_dtype),
    )
    named = {name: x.detach() for name, x in whole.items() if x is not None}
    own = {name: (x if name in ("kv", "key") else plan.shard(x)).clone().requires_grad_() for name, x in named.items()}
    case = job.cases[0]
    state = PowerState(own["kv"], own.get("key")) if "kv" in own else None
    settings: dict[str, Any] = {
        "p": case.p,
        "normalize": case.normalize,
        "initial_state": state,
        "impl": job.impl,
        "chunk_size": CHUNK,
    }
    tensors = own["k"], own["v"], own.get("log_g")
    cp: Any = plan.start(*tensors, **settings) if job.started else plan
    out, end = power_attention(own["q"], *tensors, cp=cp, return_state=True, scale=case.scale, **settings)
    parts = [out, end.kv, *([] if end.key is None else [end.key])]
    # The weights of the loss are those of the cases, one after another.
    weights = [random_like(*sizes_of(one, inputs)) for one, inputs in zip(job.cases, each, strict=True)]
    joined = [torch.cat(column, 0 if place else 1) for place, column in enumerate(zip(*weights, strict=True))]
    loss = (out.double() * plan.shard(joined[0])).sum()
    if plan.rank == plan.ranks - 1:
        # States are on every rank, and one of them asks for their gradient.
        for part, weight in zip(parts[1:], joined[1:], strict=True):
            loss = loss + (part.double() * weight).sum()
    grads = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    for name in ("kv", "key"):
        if name in grads:
            dist.all_reduce(grads[name], group=group)
    result = {"out": plan.unshard(out), "state kv": end.kv} | ({} if end.key is None else {"state key": end.key})
    for name, grad in grads.items():
        result[f"gradient of {name}"] = grad if name in ("kv", "key") else plan.unshard(grad)
    if not is_packed:
        return plan, [{name: x.detach() for name, x in result.items()}]
    spans = [slice(*pair) for pair in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    return plan, [
        {
            name: (x[index : index + 1] if name.split()[-1] in ("kv", "key") else x[:, span]).detach()
            for name, x in result.items()
        }
        for index, span in enumerate(spans)
    ]


def sizes_of(case: Case, inputs: dict[str, Tensor | None]) -> list[Tensor]:
    with torch.no_grad():
        out, state = plain(case, inputs)
    return [out, state.kv, *([] if state.key is None else [state.key])]


def beyond(job: Job, group: dist.ProcessGroup, device: str) -> list[dict[str, str]]:
    """Return the results of each case that are not within the budget of one process, on the group's first rank."""
    plan, each = call_on_ranks(job, group, device)
    if plan.rank:
        return []
    dtype = getattr(torch, job.dtype)
    inputs, _ = made(job, device)
    return [beyond_budget(case, dtype, actual, own) for case, actual, own in zip(job.cases, each, inputs, strict=True)]


def rounding(group: dist.ProcessGroup, device: str) -> dict[str, dict[str, float]]:
    """Return the largest errors, over the largest values, of an exchange in bfloat16 and of one in float32."""
    found = {}
    for way in ("gather", "scan"):
        for wire in (None, "bfloat16"):
            # In zigzag there are eight fragments, and a scan hands sums on that it has received. No gate forgets them.
            job = Job((replace(SIMPLE, tokens=400, with_state=False, gated=False),), 4, "zigzag", way)
            job = replace(job, exchange_dtype=wire)
            _, (actual,) = call_on_ranks(job, group, device)
            (case,) = job.cases
            wide = widened(case, case.inputs(torch.float32, device))
            exact = results(*plain(case, wide), wide)
            found[f"{way} {wire}"] = {
                name: largest_error(actual[name], x) / x.abs().max().item() for name, x in exact.items()
            }
    return found
