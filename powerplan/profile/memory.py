"""How much memory there is, what a run would need, and what it took."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from powerplan.accounting import DTYPE_BYTES
from powerplan.dims import spow_dim
from powerplan.ffn import MoE
from powerplan.mixers import FeatureAttention
from powerplan.mixers.base import total
from powerplan.profile.breakdown import recorder
from powerplan.profile.plan import Contender, Plan
from powerplan.profile.timing import Run

if TYPE_CHECKING:
    from powerplan.profile.runs import Place

SHARE = 0.7
"""Of the free memory, what a run may take where no limit is given."""

CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, in versions 2 and 1 of control groups."""

SLACK_BYTES = 2**29
"""Address space that threads and libraries may still want: addresses, hardly any memory."""

KEPT_BYTES = 256
"""Bytes of states per token and head that power attention keeps for its backward pass at K = V = 64, p = 2 (195)."""


def free_bytes(device: str) -> int:
    """Return the bytes that a run could take: free on the GPU, else available to this process."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="ascii").splitlines())
        found = [int(lines["MemAvailable"].split()[0]) * 1024]
    for limit, used in CGROUP_FILES:
        try:
            found.append(int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()))
        except (OSError, ValueError):  # There is no such group, or its limit reads "max".
            continue
    return max(0, min(found))


def bytes_needed(plan: Plan, contender: Contender, place: Place) -> int:
    """Return about how many bytes a run holds at once, inputs, weights and gradients included; rather too many."""
    part, kind, tokens = place
    mixer, width, batch = contender.mixer, DTYPE_BYTES[plan.dtype], plan.batch
    hidden, train = plan.spec.hidden_size, kind == "train"
    run = 1 if kind == "decode" else tokens
    heads = batch * run * (mixer.heads * (mixer.head_dim + mixer.v_head_dim) + 2 * mixer.kv_heads * mixer.head_dim)
    needed = Fraction(0)
    if part in ("state", "layer"):
        needed += heads * width * (4 if train else 2) + _of_state(contender, batch, tokens, kind, width)
    if part != "state":
        inner = heads if part in ("projections", "layer") else 0
        if plan.ffn is not None and part in ("ffn", "layer"):
            channels = plan.ffn.intermediate_size
            if isinstance(plan.ffn, MoE):
                channels = plan.ffn.top_k * (channels + 2 * hidden) + plan.ffn.shared_intermediate_size
            inner += batch * run * channels * (3 if plan.ffn.gated else 2)
        activations = (inner + 6 * batch * run * hidden) * width
        weights = (total(mixer.matmul_terms(hidden)) + (0 if part == "projections" else plan.ffn_weights())) * width
        needed += activations * (3 if train else 1) + weights * (2 if train else 1)
    return int(needed)


def _of_state(contender: Contender, batch: int, tokens: int, kind: str, width: Fraction) -> Fraction:
    mixer, train = contender.mixer, kind == "train"
    if contender.impl == "reference":
        return Fraction(4 * 3 * batch * mixer.heads * tokens**2)
    if not isinstance(mixer, FeatureAttention):
        if kind == "decode":
            return batch * mixer.state_bytes(tokens, width)
        # SDPA without a fused kernel for unequal head dims holds all weights.
        fused = mixer.head_dim == mixer.v_head_dim
        return Fraction(0 if fused else 4 * 3 * batch * mixer.heads * tokens**2)
    state = 4 * batch * mixer.state_size(tokens).recurrent
    rows = spow_dim(mixer.head_dim, mixer.degree)
    held = state * (6 if train else 3)
    if train and contender.impl == "recurrent":
        return Fraction(held + state * tokens)
    if train:
        per_row = Fraction(KEPT_BYTES, spow_dim(64, 2) * 65)
        held += int(batch * tokens * mixer.kv_heads * rows * (mixer.v_head_dim + 1) * per_row)
    return Fraction(held)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on a GPU or a CPU."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text))
    )


def peak_of(run: Run, device: str) -> int:
    """Run once; return the most bytes that were allocated at once beyond what there was before, outputs included."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with recorder(gpu=False, profile_memory=True, acc_events=True) as record:
        run()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def capped(limit: int, device: str) -> Iterator[None]:
    """Let no run take more than `limit` bytes: the allocation that would fails, and the process lives on.

    On a GPU through torch's allocator, on Linux through the address space of the process; elsewhere nothing holds.
    """
    import torch

    if device.startswith("cuda"):
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    import resource

    now = int(pages.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + limit + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
