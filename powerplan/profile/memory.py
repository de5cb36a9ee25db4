"""How much memory there is, how much a run will need, and how much it took; and the limit that runs must keep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import torch

from powerplan.dims import spow_dim
from powerplan.dtypes import DTYPE_BYTES
from powerplan.ffn import MLP, MoE
from powerplan.mixers import GLA, GSA, KDA, LogLinear, Mamba1
from powerplan.mixers.base import RECURRENT_BYTES
from powerplan.mixers.formulas import total
from powerplan.models.mixers.recurrence import ROWS_PER_BLOCK
from powerplan.models.mixers.scans import TOKENS_PER_SCAN
from powerplan.profile.breakdown import torch_profiler
from powerplan.profile.timing import Run
from powerplan.profile.workload import Point, TimedMixer, Workload

SHARE_OF_FREE = 0.7
"""Share of the free memory that a run may take where the user gives no limit."""

ASSUMED_FREE_BYTES = 2**33
"""Free memory where the system does not say it to Python, as on Windows; --memory-limit gives another."""

CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Files of a container's memory limit and use, in versions 2 and 1 of control groups."""

EXTRA_ADDRESS_SPACE = 2**29
"""Bytes of address space left to threads and libraries beyond the limit of a run: addresses, hardly any memory."""

COPIES = 12
"""fp32 tensors of the size of keys, of values and of scores that a recurrence holds at once, without gradients."""

KEPT_BYTES = 256
"""Bytes of states kept for the backward pass, per token and head at K = V = 64, p = 2; 195 were measured."""


def free_bytes(device: str) -> int:
    """Return the bytes that are free on the GPU, or available to this process on a processor."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free = [ASSUMED_FREE_BYTES]
    if hasattr(os, "sysconf"):
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="ascii").splitlines())
        free = [int(lines["MemAvailable"].split()[0]) * 1024]
    for limit, used in CGROUP_FILES:
        with suppress(OSError, ValueError):  # There is no such group, or its limit reads "max".
            free.append(int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()))
    return max(0, min(free))


def bytes_needed(workload: Workload, timed: TimedMixer, point: Point) -> int:
    """Return about how many bytes a run holds at once, inputs, weights and gradients included; rather too many."""
    mixer, shape, width = timed.mixer, timed.shape, DTYPE_BYTES[workload.dtype]
    hidden, tokens = workload.spec.hidden_size, workload.batch * point.tokens
    heads = tokens * (shape.heads * (shape.head_dim + shape.v_head_dim) + 2 * shape.kv_heads * shape.head_dim)
    needed = Fraction(0)
    if point.part in ("state", "layer"):
        needed += heads * width * (4 if point.trains else 2) + _mixer_bytes(workload, timed, point)
    if point.part == "state":
        return int(needed)
    inner = heads if point.part in ("projections", "layer") else 0
    if isinstance(workload.ffn, MLP | MoE) and point.part in ("ffn", "layer"):  # No other FFN is built.
        channels = workload.ffn.intermediate_size
        if isinstance(workload.ffn, MoE):
            channels = workload.ffn.top_k * (channels + 2 * hidden) + workload.ffn.shared_intermediate_size
        inner += tokens * channels * (3 if workload.ffn.gated else 2)
    activations = (inner + 6 * tokens * hidden) * width
    ffn_weights = 0 if point.part == "projections" else workload.ffn_weights()
    weights = (total(mixer.matmul_terms(hidden)) + ffn_weights) * width
    return int(needed + activations * (3 if point.trains else 1) + weights * (2 if point.trains else 1))


def _mixer_bytes(workload: Workload, timed: TimedMixer, point: Point) -> Fraction:
    """Return the bytes that the mixer itself holds: its state, T^2 weights, or what it keeps for the backward pass."""
    batch, context, shape = workload.batch, point.context, timed.shape
    if timed.is_recurrent:
        return _recurrence_bytes(workload, timed, point)
    all_weights = Fraction(4 * 3 * batch * shape.heads * context**2)
    if timed.impl == "reference":
        return all_weights
    mixer = timed.feature
    if mixer is None:
        if point.decodes:
            return batch * timed.mixer.state_bytes(context, DTYPE_BYTES[workload.dtype])
        # SDPA has no fused kernel for unequal head dims.
        return Fraction(0) if shape.head_dim == shape.v_head_dim else all_weights
    state = RECURRENT_BYTES * batch * mixer.state_size(context).recurrent
    if not point.trains:
        return Fraction(state * 3)
    if timed.impl == "recurrent":
        return Fraction(state * (6 + context))
    if timed.impl == "triton":
        # A state before each chunk, and its gradient, in bf16 for bf16 inputs and in fp32 for others.
        chunks = batch * -(-context // (timed.chunk_size or context))
        stored = 2 if workload.dtype == "bf16" else 4
        held = chunks * mixer.kv_heads * mixer.executed_dim * (mixer.v_head_dim * stored + 4)
        return Fraction(state * 6 + 2 * held)
    kept_per_row = Fraction(KEPT_BYTES, spow_dim(64, 2) * 65)
    rows = spow_dim(mixer.head_dim, mixer.degree) * (mixer.v_head_dim + 1)
    return Fraction(state * 6 + int(batch * context * mixer.kv_heads * rows * kept_per_row))


def _recurrence_bytes(workload: Workload, timed: TimedMixer, point: Point) -> Fraction:
    """Return the bytes that a recurrence in chunks holds: fp32 tensors of keys, values, scores and states.

    COPIES of each are the most that were measured, in gla and kda, which have decays of each key channel.
    """
    batch, context, shape = workload.batch, point.context, timed.shape
    state = RECURRENT_BYTES * batch * timed.mixer.state_size(context).recurrent
    if point.decodes:
        return Fraction(4 * state)
    if isinstance(timed.mixer, Mamba1):  # Its states of all tokens, or of those of one scan.
        tokens = context if point.trains else min(context, TOKENS_PER_SCAN)
        return Fraction(COPIES * RECURRENT_BYTES * batch * tokens * timed.mixer.inner_size * timed.mixer.state_dim)
    chunk = min(timed.chunk_size or context, context)
    of_channels = shape.head_dim * -(-chunk // ROWS_PER_BLOCK) if isinstance(timed.mixer, GLA | GSA | KDA) else 0
    numbers = shape.heads * (COPIES * (shape.head_dim + shape.v_head_dim + chunk) + 4 * of_channels)
    if isinstance(timed.mixer, LogLinear):  # A chunk adds to one level and reads the others where they are.
        state //= context.bit_length()
    chunks = -(-context // chunk)
    return Fraction(RECURRENT_BYTES * batch * context * numbers + 3 * state * chunks) * (2 if point.trains else 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory: of Python, of a GPU, or of torch on a processor."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text))
    )


def peak_of(run: Run, device: str) -> int:
    """Run once and return the most bytes allocated at once beyond those before the run, outputs included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch_profiler(gpu=False, profile_memory=True, acc_events=True) as record:
        run()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def memory_limited(limit: int, device: str) -> Iterator[None]:
    """Make allocations fail that would pass `limit` bytes, so that an error ends the run and not the process: on a GPU
    by torch's allocator, on Linux by the process's address space. Elsewhere nothing keeps the limit."""
    pages = Path("/proc/self/statm")
    with ExitStack() as afterwards:
        if device.startswith("cuda"):
            # By number: torch.cuda.set_per_process_memory_fraction refuses "cuda" without one.
            index = torch.device(device).index
            index = torch.cuda.current_device() if index is None else index
            installed = torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / installed), index)
            afterwards.callback(torch.cuda.set_per_process_memory_fraction, 1.0, index)
        elif pages.exists():
            import resource

            used = int(pages.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            allowed = used + limit + EXTRA_ADDRESS_SPACE
            allowed = allowed if hard == resource.RLIM_INFINITY else min(allowed, hard)
            resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
            afterwards.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        yield
