"""Where the time of a training call goes: each launch, its role in the algorithm, and the role's useful FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch._C._autograd import DeviceType

from powerplan.dims import default_chunk_size, tiled_spow_dim
from powerplan.profile.breakdown import torch_profiler
from powerplan.profile.timing import Run
from support.shapes import Shape, Variant, engine_of

TILE = 8
"""Features of a tile of the kernels' layout of phi."""

PROFILED_RUNS = 3
"""A launch's time is the median of as many runs."""

PREPARE, STATES = ("prepare", "prepare backward"), ("states", "states backward")
OUTPUT, DQ, DK_DV = ("output",), ("dq",), ("dk, dv",)

ROLES: dict[str, tuple[str, ...]] = {
    "prepare_kernel": PREPARE,
    "scan_kernel": STATES,
    "states_kernel": STATES,
    "running_kernel": STATES,
    "output_kernel": OUTPUT,
    "expand_kernel": OUTPUT + DK_DV,
    "queries_kernel": DQ,
    "contract_kernel": DQ + DK_DV,
    "keys_kernel": DK_DV,
    "fixed_states_kernel": STATES,
    "fixed_expand_kernel": OUTPUT + DK_DV,
    "fixed_contract_kernel": DQ + DK_DV,
}
"""Roles of a kernel by its name, in the order of its launches in a training call: each role has as many launches.

What several kernels do together has one role, whose time is the sum of theirs. prepare_kernel is a role alone: states,
output and gradients use what it makes (sums of gates, copies, sums of k k^T). Names are whole: torch has kernels of
such names, too.
"""

WITH_NORMALISER = {("fixed_expand_kernel", 5): OUTPUT + OUTPUT + DQ + DK_DV + DK_DV}
"""The same by name and number of launches, where p = 4 asks the normaliser's state with the kernel of the others."""

ALONE = ("states_kernel", "fixed_states_kernel", "scan_kernel")
"""Kernels whose share of the matrix product is recorded alone, too: beside them a role has much that moves memory."""

OTHER = "other"
"""The role of all other kernels: the gradient of gates, and what torch launches."""


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


def roles_of(found: Sequence[Launch]) -> list[str]:
    """Return the role of each launch of a training call."""
    counts = Counter(launch.kernel for launch in found)
    roles = (
        WITH_NORMALISER.get((launch.kernel, counts[launch.kernel])) or ROLES.get(launch.kernel, (OTHER,))
        for launch in found
    )
    return [
        of_kernel[launch.index * len(of_kernel) // counts[launch.kernel]]
        for launch, of_kernel in zip(found, roles, strict=True)
    ]


def role_flops(shape: Shape, variant: Variant) -> dict[str, int]:
    """Return the useful FLOPs of each role in a training call: products that no kernel can do without, 2 a
    multiply-add. Preparing has none: what it multiplies is for the normaliser.

    phi has the rows of the kernels' layout in tiles of 8 features: 2,304 for the 2,080 distinct entries at head dim 64.
    Causal pairs only, the first chunk queries no state and the last adds to none, and the normaliser is left out. The
    backward pass has twice the products of the forward pass: with the state, one in the states' gradient, one in dq and
    two in dk and dv; within chunks, half in dq and half in dk and dv. What is computed again counts for nobody.
    """
    p, d = variant.p or 2, shape.head_dim
    chunk = variant.chunk or default_chunk_size(d, p, engine_of(variant))
    whole, rest = divmod(shape.tokens, chunk)
    pairs = (whole * chunk * (chunk + 1) + rest * (rest + 1)) // 2
    rows = d if p == 1 else tiled_spow_dim(d, p, TILE)
    with_state = 2 * rows * d * shape.batch
    query = with_state * shape.heads * max(0, shape.tokens - chunk)
    update = with_state * shape.kv_heads * max(0, shape.tokens - (rest or chunk))
    within = 4 * d * pairs * shape.batch * shape.heads
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
    """Return seconds and share of the matrix product by role, for the result file, of roles that had a launch.

    The share is None for roles without useful FLOPs.

    `kernels` says whose time it is. Those of ALONE have a record of their own after that of their role.
    """
    kernels: dict[str, dict[str, float]] = {}
    for launch, role in zip(found, roles_of(found), strict=True):
        seconds = kernels.setdefault(role, {})
        seconds[launch.kernel] = seconds.get(launch.kernel, 0.0) + launch.seconds
    records = []
    for role, seconds in kernels.items():
        parts = {role: seconds}
        parts |= {f"{role}, {name} alone": {name: seconds[name]} for name in ALONE if name in seconds}
        for name, times in parts.items():
            total = sum(times.values())
            share = useful[role] / total / matmul_rate if role in useful else None
            fields: dict[str, Any] = {"cell": cell, "role": name, "flops": useful.get(role), "seconds": total}
            records.append(fields | {"share_of_matmul": share, "kernels": sorted(times)})
    return records
