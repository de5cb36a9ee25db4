"""The machine that runs are timed on: its device, its name and its rates."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version

import torch

from powerplan.doctor import cores
from powerplan.errors import InputError, MachineError, allowed_values, shown
from powerplan.hardware import Device, Peak, find_device, si_value
from powerplan.profile.runs import torch_dtype
from powerplan.profile.timing import Clock, clock_of, copy_rate, cpu_clock, matmul_rate

DTYPES = ("fp32", "bf16", "fp16")
"""Dtypes that layers run in."""


MAX_COMPILED = 256
"""Contexts and passes that one function may be compiled for."""


@dataclass(frozen=True)
class Machine:
    """A device, its rates as measured in this run and as times are predicted with (peak), and torch's threads there."""

    device: str
    name: str
    clock: Clock
    matmul_flops_per_s: float
    copy_bytes_per_s: float
    peak: Peak
    threads: int | None


def resolve_device(text: str) -> str:
    """Return "cpu", "cuda" or "cuda:1" for "auto" or a name. Raises InputError for others, MachineError for no GPU."""
    if text != "auto" and not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        allowed = allowed_values(text, ["auto", "cpu", "cuda"])
        raise InputError(f"{shown(text)} is not known{allowed}, cuda:1", "--device")
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text.startswith("cuda"):
        if not torch.cuda.is_available():
            raise MachineError(f"--device {text}: torch finds no CUDA device here; --device cpu runs on the processor")
        count = torch.cuda.device_count()
        if int(text.partition(":")[2] or 0) >= count:
            raise MachineError(f"--device {text}: there are {count} CUDA devices here, counted from 0")
    return text


def check_dtype(text: str, device: str) -> None:
    """Raise InputError for a dtype that layers do not run in, MachineError for one that the device does not have."""
    if text not in DTYPES:
        raise InputError(f"{shown(text)} is not a dtype that layers run in{allowed_values(text, DTYPES)}", "--dtype")
    if text == "bf16" and device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise MachineError(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bf16; take fp16")


def default_dtype(device: str) -> str:
    """Return the dtype of layers where the user names none: fp32 on a processor, bf16 on a GPU, or fp16 on one without
    bf16."""
    if not device.startswith("cuda"):
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@contextmanager
def used(device: str) -> Iterator[None]:
    """Make a GPU torch's current device, on which its events and streams are, and let it compile for many contexts."""
    if not device.startswith("cuda"):
        yield
        return
    from torch._dynamo import config

    # FlexAttention is compiled for every context, forward and training. Past the limit, which is 8, torch raises.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with torch.cuda.device(device), config.patch({limit: MAX_COMPILED}):
        yield


def examine(device: str, dtype: str) -> Machine:
    """Return the machine with its rates, as measured now and, where it has the device, by the catalogue."""
    clock = clock_of(device)
    product, copy = matmul_rate(device, torch_dtype(dtype), clock), copy_rate(device, clock)
    name = _device_name(device)
    known: Device | None = None
    with suppress(InputError):
        known = find_device(name)
    # fp32 products run as fp32 unless torch is told otherwise, so their peak is not that of tf32.
    flops_per_s = si_value(known, f"{dtype}_tflops") if known else None
    bytes_per_s = si_value(known, "memory_gbs") if known else None
    peak_of = f"{known.name}, {dtype}" if known and flops_per_s else "the matrix product measured"
    peak = Peak(name, Fraction(flops_per_s or product), Fraction(bytes_per_s or copy), peak_of)
    threads = None if device.startswith("cuda") else torch.get_num_threads()
    return Machine(device, name, clock, product, copy, peak, threads)


def choose_threads(device: str) -> str | None:
    """Let torch use one thread where that is faster, and OMP_NUM_THREADS does not decide; return a note if so.
    Where other programs use the processor too, threads wait for one another: small products can take ten times as
    long, and the fastest mixer becomes another one."""
    threads = torch.get_num_threads()
    if device.startswith("cuda") or threads == 1 or os.environ.get("OMP_NUM_THREADS"):
        return None
    x = torch.randn(8, 192, 192)  # A square product takes some 50 us in one thread.

    def products() -> None:
        for _ in range(15):  # More would take seconds where threads wait for one another: 60 took 7 s in two of them.
            (x @ x).mul_(2)

    several = min(cpu_clock(products) for _ in range(3))
    torch.set_num_threads(1)
    if min(cpu_clock(products) for _ in range(3)) < several:
        return f"timed in 1 thread: {threads} threads are slower here now, as on a busy machine (see OMP_NUM_THREADS)"
    torch.set_num_threads(threads)
    return None


def emulation_note(machine: Machine, dtype: str) -> str | None:
    """Return a note where a processor emulates products in `dtype`: fp16 reaches 1 GFLOP/s where fp32 reaches 190."""
    if machine.threads is None or dtype == "fp32":
        return None
    rate = machine.matmul_flops_per_s
    fp32_rate = matmul_rate(machine.device, torch_dtype("fp32"), machine.clock)
    if 2 * rate > fp32_rate:
        return None
    return (
        f"products in {dtype} run at {rate / 1e9:,.3g} GFLOP/s here, and at {fp32_rate / 1e9:,.3g} in fp32, in which "
        f"power attention computes: share and ideal compare with the rate in {dtype}"
    )


def _device_name(device: str) -> str:
    """Return the GPU's name as torch has it, or the processor's cores, architecture and vector units."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{cores()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str | None]:
    """Return the versions of torch and triton; None for what is not installed."""
    installed: dict[str, str | None] = {"torch": None, "triton": None}
    for package in installed:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
