"""Where the time of a training call goes: each launch, its role in the algorithm, and the role's useful FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch._C._autograd import DeviceType

from powerplan.dims import default_chunk_size
from powerplan.mixers import Convention, Power
from powerplan.profile.breakdown import torch_profiler
from powerplan.profile.timing import Run
from support.shapes import Shape, Variant, engine_of, normalized

PROFILED_RUNS = 3
"""A launch's time is the median of as many runs."""

ROLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("scan_kernel", ("states", "states backward")),
    ("output_kernel", ("output",)),
    ("queries_kernel", ("dq",)),
    ("keys_kernel", ("dk, dv",)),
)
"""Roles of kernels by a part of their names: of the first launch in a call, of the second, and so on.

A kernel with more launches than roles has the last role in all further ones. What several kernels do together has one
role, whose time is the sum of theirs.
"""

OTHER = "other"
"""The role of all other kernels: gates, normaliser, copies."""


@dataclass(frozen=True)
class Launch:
    """One launch in a call: the kernel's name, which of its launches this is (from 0), and its seconds."""

    kernel: str
    index: int
    seconds: float


def launches(run: Run, device: str) -> list[Launch]:
    """Return the launches of one run in their order; on a CPU the stages that the torch engine marks."""
    calls = [_recorded(run, device) for _ in range(PROFILED_RUNS)]
    names = [name for name, _ in calls[-1]]
    # A run in which something else was launched (a first use of the profiler) cannot be laid over the others.
    alike = [call for call in calls if [name for name, _ in call] == names]
    seen: dict[str, int] = {}
    found: list[Launch] = []
    for place, name in enumerate(names):
        index = seen.setdefault(name, 0)
        seen[name] += 1
        found.append(Launch(name, index, median(call[place][1] for call in alike)))
    return found


def _recorded(run: Run, device: str) -> list[tuple[str, float]]:
    gpu = device.startswith("cuda")
    with torch_profiler(gpu) as record:
        run()
        if gpu:
            torch.cuda.synchronize()
    events = [event for event in record.events() if _counts(event, gpu)]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in events]


def _counts(event: Any, gpu: bool) -> bool:
    """Whether an event of the profiler is a kernel (or a copy) on a GPU, or a stage on a CPU."""
    if gpu:
        return bool(event.device_type == DeviceType.CUDA) and event.time_range.elapsed_us() > 0
    return str(event.name).startswith("power: ")


def role_of(launch: Launch) -> str:
    """Return the role of a launch."""
    for part, roles in ROLES:
        if part in launch.kernel:
            return roles[min(launch.index, len(roles) - 1)]
    return OTHER


def role_flops(shape: Shape, variant: Variant) -> dict[str, int]:
    """Return the useful FLOPs of each role in a training call: the planner's, causal pairs only.

    The backward pass has twice those of the forward pass: of the products with the state, one is in the scan for dS,
    one in dq and two in dk and dv; of the products within chunks, half are in dq and half in dk and dv. What is
    computed again counts for nobody.
    """
    p = variant.p or 2
    chunk = variant.chunk or default_chunk_size(shape.head_dim, p, engine_of(variant))
    mixer = Power(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        p=p,
        chunk_size=chunk,
        normalize=normalized(variant),
    )
    terms = mixer.state_flops_terms(shape.tokens, Convention("exact", "chunked"))

    def count(part: str) -> int:
        return sum(int(term.value * shape.batch * shape.tokens) for term in terms if part in term.component)

    query, update, within = count("query state"), count("update state"), count("within chunks")
    return {
        "output": query + within,
        "states": update,
        "states backward": query,
        "dq": query + within,
        "dk, dv": 2 * update + within,
    }


def role_records(
    found: Sequence[Launch], useful: Mapping[str, int], matmul_rate: float, cell: str
) -> list[dict[str, Any]]:
    """Return seconds and share of the matrix product by role, for the result file, of roles that had a launch."""
    seconds: dict[str, float] = {}
    for launch in found:
        role = role_of(launch)
        seconds[role] = seconds.get(role, 0.0) + launch.seconds
    return [
        {
            "cell": cell,
            "role": role,
            "flops": useful.get(role),
            "seconds": time,
            "share_of_matmul": useful[role] / time / matmul_rate if role in useful else None,
        }
        for role, time in seconds.items()
    ]
