"""Work for four processes that share sequences: calls of power attention on ranks, held to the error budget of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shared_calls import COUNT, GROUPS, JOBS, KIND, beyond, device_of, rounding
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from powerplan.kernels import ContextParallel, power_attention
from powerplan.kernels.distributed import exchange
from powerplan.kernels.testing import Case


def all_work(rank: int, folder: Path) -> None:
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    device = device_of(rank)
    groups = {size: dist.new_group(list(ranks)) for size, ranks in GROUPS.items()}
    found: dict[str, Any] = {}
    for number, job in enumerate(JOBS):
        if rank in GROUPS[job.ranks]:
            found[str(number)] = beyond(job, groups[job.ranks], device)
    found["rounding"] = rounding(groups[4], device)
    found["traffic"] = traffic(groups[4], device)
    found["order"] = order(groups[4], device)
    found["mesh"] = meshes(device)
    found["refusals"] = refusals(groups[4], device)
    found["shards"] = shards(groups[4], device)
    found["compiled"] = compiled(groups[4], device)
    found["checkpoint"] = checkpointed(groups[4], device)
    found["failure"] = failures(rank, device) if KIND == "cpu" else None
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if KIND == "cpu":
        found["death"] = deaths(rank, device)
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


class CountBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators of torch.distributed are given to send."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::") and "recv" not in name:
            has_output_first = any(word in name for word in ("allgather", "alltoall", "reduce_scatter"))
            sent = args[1] if has_output_first else args[0]
            self.bytes += sum(x.numel() * x.element_size() for x in (sent if isinstance(sent, list) else [sent]))
        return func(*args, **(kwargs or {}))


def traffic(group: dist.ProcessGroup, device: str) -> list[dict[str, Any]]:
    """Return the bytes that this rank sent, forward and backward, and those that the plan says."""
    found = []
    for way in ("gather", "scan"):
        for layout in ("contiguous", "zigzag"):
            for gated, wire, tokens in ((True, None, 40), (True, None, 333), (False, None, 40), (True, "bfloat16", 40)):
                case = Case(tokens=tokens, gated=gated)
                inputs = case.inputs(torch.float32, device)
                dtype = None if wire is None else torch.bfloat16
                plan = ContextParallel(group, tokens=tokens, layout=layout, exchange=way, exchange_dtype=dtype)
                own = [None if x is None else plan.shard(x) for x in inputs.values()]

                def call(own: list[Any] = own, plan: ContextParallel = plan) -> Tensor:
                    out, state = power_attention(*own[:4], cp=plan, return_state=True)
                    return out.sum() + state.kv.sum()

                call().backward()  # compares arguments, once
                row: dict[str, Any] = {"what": f"{way} {layout} gated={gated} {wire}", "tokens": tokens}
                sizes: dict[str, Any] = {"kv_heads": 2, "head_dim": 8, "v_head_dim": 5, "gated": gated, "batch": 2}
                with CountBytes() as count:
                    loss = call()
                row["forward"] = count.bytes
                with CountBytes() as count:
                    loss.backward()
                row["backward"] = count.bytes
                for name, back in (("planned forward", False), ("planned backward", True)):
                    row[name] = plan.exchanged_bytes(**sizes, return_state=True, backward=back)
                found.append(row)
    return found


def order(group: dist.ProcessGroup, device: str) -> list[str]:
    """Return what happens in which order in a call whose exchange was started before its queries were made."""
    inputs = Case(tokens=40).inputs(torch.float32, device)
    plan = ContextParallel(group, tokens=40)
    q, k, v, log_g = (plan.shard(x).detach().requires_grad_() for x in list(inputs.values())[:4] if x is not None)
    events: list[str] = []
    started, ended = exchange.Scan.__init__, exchange.Scan.finish

    def begin(self: Any, *arguments: Any, **settings: Any) -> None:
        events.append(f"sent {'back' if settings['reverse'] else 'on'}")
        started(self, *arguments, **settings)

    def finish(self: Any) -> Tensor:
        events.append(f"received {'back' if self.reverse else 'on'}")
        return ended(self)

    exchange.Scan.__init__, exchange.Scan.finish = begin, finish  # type: ignore[method-assign]
    try:
        cp = plan.start(k, v, log_g)
        projected = q * 1.0
        events.append("queries")
        projected.register_hook(lambda grad: events.append("queries back"))
        out = power_attention(projected, k, v, log_g, cp=cp)
        assert isinstance(out, Tensor)
        out.sum().backward()
    finally:
        exchange.Scan.__init__, exchange.Scan.finish = started, ended  # type: ignore[method-assign]
    return events


def meshes(device: str) -> list[int]:
    """Return the ranks of plans over the dims of a mesh of 2 x 2, and check a call over one of them."""
    mesh = init_device_mesh(KIND, (2, 2), mesh_dim_names=("fsdp", "cp"))
    plan = ContextParallel(mesh["cp"], tokens=10)
    x = torch.ones(1, plan.local_tokens, 1, 4, device=device)
    out = power_attention(x, x, x, cp=plan)
    assert isinstance(out, Tensor)
    assert torch.allclose(out, x)
    return [plan.rank, plan.ranks, ContextParallel(mesh["fsdp"], tokens=10).rank]


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(group: dist.ProcessGroup, device: str) -> dict[str, str]:
    """Return the message of each call that is refused: on all ranks where ranks differ."""
    rank = dist.get_rank(group)
    k = torch.ones(1, 10, 1, 4, device=device)

    def plan(**settings: Any) -> ContextParallel:
        return ContextParallel(group, **({"tokens": 40} | settings))

    def call(plan: ContextParallel, q: Any = k, k: Any = k, **settings: Any) -> Any:
        return power_attention(q, k, settings.pop("v", k), settings.pop("log_g", None), cp=plan, **settings)

    ones, usual = torch.ones, plan()
    bad = [[(0, 10)], [(10, 30)], [(30, 40)]]
    found: dict[str, Callable[[], object]] = {
        "no tokens": lambda: plan(tokens=None),
        "both": lambda: plan(cu_seqlens=[0, 40]),
        "tokens": lambda: plan(tokens=0),
        "falls": lambda: plan(tokens=None, cu_seqlens=torch.tensor([0, 30, 20])),
        "begins": lambda: plan(tokens=None, cu_seqlens=[1, 30]),
        "not integers": lambda: plan(tokens=None, cu_seqlens=[0, 1.5]),
        "layout": lambda: plan(layout="ring"),
        "layout type": lambda: plan(layout=[3, 4]),
        "layout ranks": lambda: plan(layout=bad),
        "layout twice": lambda: plan(layout=[*bad, [(5, 20)]]),
        "layout hole": lambda: plan(layout=[[(0, 10)], [(12, 30)], [(30, 40)], []]),
        "layout end": lambda: plan(layout=[[(0, 10)], [(10, 30)], [], []]),
        "layout range": lambda: plan(layout=[[(0, 50)], [], [], []]),
        "exchange": lambda: plan(exchange="ring"),
        "exchange dtype": lambda: plan(exchange_dtype=torch.float16),
        "group": lambda: ContextParallel([0, 1], tokens=4),  # type: ignore[arg-type]
        "cp": lambda: power_attention(k, k, k, cp=group),  # type: ignore[arg-type]
        "cu_seqlens": lambda: call(plan(), cu_seqlens=torch.tensor([0, 10])),
        "plans differ": lambda: plan(tokens=40 + int(rank == 2)),
        "layouts differ": lambda: plan(layout="zigzag" if rank == 3 else "contiguous"),
        "one has no plan": lambda: plan(layout="ring" if rank == 1 else "contiguous"),
        "local tokens": lambda: call(plan(), k=ones(1, 9, 1, 4, device=device) if rank == 1 else k),
        "query tokens": lambda: call(plan(), q=ones(1, 9, 1, 4, device=device) if rank == 3 else k),
        "head dims": lambda: call(plan(), *[ones(1, 10, 1, 4 + rank % 2, device=device)] * 2),
        "rows": lambda: call(plan(), *[ones(1 + rank % 2, 10, 1, 4, device=device)] * 2),
        "gates": lambda: call(plan(), log_g=k[..., 0] * 0 if rank else None),
        "gradients": lambda: call(plan(), v=k.clone().requires_grad_() if rank == 2 else k),
        "return_state": lambda: call(plan(), return_state=rank == 0),
        "degree": lambda: call(plan(), p=3),
        "scale": lambda: call(plan(), scale=1e30),
        "packed rows": lambda: call(plan(tokens=None, cu_seqlens=[0, 40]), *[k.expand(2, -1, -1, -1)] * 2),
        "shard": lambda: plan().shard(k),
        "unshard": lambda: plan().unshard(k[:, 1:]),
        "used": lambda: used_twice(plan(), k),
        "check": lambda: plan(check=1),
        "dim": lambda: plan().shard(k, dim=5),
        "halo": lambda: plan().halo(2.5),  # type: ignore[arg-type]
        "features": lambda: plan().halo(2).sent_bytes(0, 4),
        "planned head dim": lambda: plan().exchanged_bytes(2, -4),
        "planned degree": lambda: plan().exchanged_bytes(2, 4, p=9),
        "another": lambda: power_attention(k, k.clone(), k, cp=plan().start(k, k)),
        "torch.func": lambda: torch.func.grad(lambda x: call(usual, q=x).sum())(k),
        "a whole graph": lambda: torch.compile(call, fullgraph=True, backend="eager")(plan()),
        "forward mode": lambda: torch.func.jvp(lambda x: call(usual, k=x), (k,), (k,)),
    }
    return {name: message(one) for name, one in found.items()}


def used_twice(plan: ContextParallel, k: Tensor) -> None:
    started = plan.start(k, k)
    power_attention(k, k, k, cp=started)
    power_attention(k, k, k, cp=started)


def shards(group: dist.ProcessGroup, device: str) -> dict[str, Any]:
    """Return what a plan of packed sequences in zigzag says of this rank, and what it makes of tensors."""
    plan = ContextParallel(group, cu_seqlens=[0, 5, 16], layout="zigzag")
    x = torch.arange(32.0, device=device).view(2, 16).requires_grad_()
    own = plan.shard(x)
    own.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return {
        "ids": plan.token_ids().tolist(),
        "positions": plan.positions().tolist(),
        "cu_seqlens": plan.cu_seqlens().tolist(),
        "shard": own.tolist(),
        "gradient": x.grad.tolist(),
        "unshard": torch.equal(plan.unshard(own), x),
        "text": repr(plan),
    }


def compiled(group: dist.ProcessGroup, device: str) -> list[bool]:
    """Return whether a compiled function with a call in it gives the same output and gradient."""
    plan = ContextParallel(group, tokens=40)
    x = torch.rand(1, 10, 1, 4, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        out = power_attention(x.cos(), x.sin(), x, cp=plan)
        assert isinstance(out, Tensor)
        return out.exp()

    made = [(call(x), x) for call in (function, torch.compile(function, backend="eager"))]
    grads = [torch.autograd.grad(out.sum(), x)[0] for out, x in made]
    return [torch.equal(made[0][0], made[1][0]), torch.equal(*grads)]


def checkpointed(group: dist.ProcessGroup, device: str) -> float:
    """Return the largest difference of gradients with and without recomputation."""
    from torch.utils.checkpoint import checkpoint

    inputs = Case(tokens=40).inputs(torch.float64, device)
    plan = ContextParallel(group, tokens=40, exchange="scan")
    own = [plan.shard(x).detach().requires_grad_() for x in list(inputs.values())[:4] if x is not None]

    def call(*tensors: Tensor) -> Tensor:
        out = power_attention(*tensors, cp=plan)
        assert isinstance(out, Tensor)
        return out.square()

    expected = torch.autograd.grad(call(*own).sum(), own)
    again: Any = checkpoint(call, *own, use_reentrant=False)
    actual = torch.autograd.grad(again.sum(), own)
    return max((one - two).abs().max().item() for one, two in zip(actual, expected, strict=True))


TIMEOUT = timedelta(seconds=5)
"""Of groups in which a rank waits in vain."""


def failures(rank: int, device: str) -> list[str]:
    """Return the messages of this rank, forward and backward: one of each two ranks waits for one that never calls.

    The first two ranks gather, and the others scan. States go on in the sequence, and gradients back; who only sends
    does not wait. So the second rank of a pair waits forward, in one group, while the first waits backward, in another.
    """
    pairs = [[0, 1], [2, 3]]
    groups = [[dist.new_group(pair, timeout=TIMEOUT) for pair in pairs] for _ in range(2)]
    x = torch.ones(1, 10, 1, 4, device=device, requires_grad=True)
    calls = []
    for group in groups:
        plan = ContextParallel(group[rank // 2], tokens=20, exchange="gather" if rank < 2 else "scan")
        calls.append(partial(power_attention, x, x, x, cp=plan))
        calls[-1]().sum().backward()  # type: ignore[union-attr]
    forward, backward = calls
    out = backward()
    assert isinstance(out, Tensor)
    said = ["silent", message(out.sum().backward)] if rank % 2 == 0 else [message(forward), "silent"]
    dist.barrier()
    return said


def deaths(rank: int, device: str) -> list[str]:
    """Return the messages of a rank that waits for one that is gone. Rank 3 goes."""
    group = dist.new_group(list(range(COUNT)))
    plan = ContextParallel(group, tokens=40)
    x = torch.ones(1, 10, 1, 4, device=device)
    power_attention(x, x, x, cp=plan)
    if rank == COUNT - 1:
        os._exit(0)
    said = [message(lambda: power_attention(x, x, x, cp=plan))]
    # What ranks compare is an exchange, too.
    return [*said, message(lambda: power_attention(x, x, x, cp=plan, return_state=True))]
