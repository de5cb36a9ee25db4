"""The machine that is measured on: its device, what it is called, its rates, and the roofline they make."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version

from powerplan.errors import InputError, MachineError, allowed_values, shown
from powerplan.hardware import Device, find_device, si_value
from powerplan.profile.plan import DTYPES
from powerplan.profile.runs import torch_dtype
from powerplan.profile.timing import Clock, clock_of, copy_rate, cpu_clock, matmul_rate

PEAKS = {"fp32": "fp32_tflops", "bf16": "bf16_tflops", "fp16": "fp16_tflops"}
"""Rate of the catalogue by dtype. fp32 products run as fp32 unless torch is told otherwise, not as tf32."""


@dataclass(frozen=True)
class Machine:
    """Rates in FLOP/s and bytes/s: measured in this run, and those that times are predicted with."""

    device: str
    name: str
    clock: Clock
    matmul_flops_per_s: float
    copy_bytes_per_s: float
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    peak_of: str
    threads: int | None

    def roofline(self, flops: Fraction, moved: Fraction) -> float:
        """Return the seconds that `flops` and `moved` bytes take at least."""
        return max(float(flops) / self.peak_flops_per_s, float(moved) / self.bandwidth_bytes_per_s)


def need_torch() -> None:
    """Raise MachineError where torch is not installed, or does not load."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        missing = getattr(error, "name", None) == "torch"
        reason = (
            "needs torch, and it is not installed: pip install torch" if missing else f"torch does not load: {error}"
        )
        raise MachineError(f"profile: {reason}") from None


def resolve_device(text: str, where: str = "--device") -> str:
    """Return "cpu", "cuda" or "cuda:1" for "auto" or a name. Raises InputError for others, MachineError for no GPU."""
    if text != "auto" and not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise InputError(f"{shown(text)} is not known{allowed_values(text, ['auto', 'cpu', 'cuda'])}, cuda:1", where)
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text.startswith("cuda"):
        if not torch.cuda.is_available():
            raise MachineError(f"{where} {text}: torch finds no CUDA device here; --device cpu runs on the processor")
        count = torch.cuda.device_count()
        if int(text.partition(":")[2] or 0) >= count:
            raise MachineError(f"{where} {text}: there are {count} CUDA devices here, counted from 0")
    return text


def resolve_dtype(text: str | None, device: str, where: str = "--dtype") -> str:
    """Return the dtype: bf16 on a GPU and fp32 on a CPU where none is given. Raises InputError or MachineError."""
    if text is None:
        return "bf16" if device.startswith("cuda") else "fp32"
    if text not in DTYPES:
        hint = allowed_values(text, DTYPES)
        raise InputError(f"{shown(text)} is not a dtype that layers run in{hint}", where)
    if text == "bf16" and device.startswith("cuda"):
        import torch

        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise MachineError(f"{where} bf16: {torch.cuda.get_device_name(device)} has no bf16; take fp16")
    return text


def examine(device: str, dtype: str) -> Machine:
    """Measure the machine's rates: a matrix product in `dtype`, and a copy."""
    import torch

    clock = clock_of(device)
    product, copy = matmul_rate(device, torch_dtype(dtype), clock), copy_rate(device, clock)
    name = device_name(device)
    known = _in_catalogue(name)
    peak = si_value(known, PEAKS[dtype]) if known else None
    bandwidth = si_value(known, "memory_gbs") if known else None
    return Machine(
        device=device,
        name=name,
        clock=clock,
        matmul_flops_per_s=product,
        copy_bytes_per_s=copy,
        peak_flops_per_s=peak or product,
        bandwidth_bytes_per_s=bandwidth or copy,
        peak_of=f"{known.name}, {dtype}" if known and peak else "the matrix product measured",
        threads=None if device.startswith("cuda") else torch.get_num_threads(),
    )


SMALL, ROUNDS = 192, 60
"""Rows of a product that is over in some 50 us, and how many of them tell how well threads work together."""


def settle_threads(device: str) -> str | None:
    """Let torch use one thread where that is faster than the many it would use; return a remark then.

    On a processor that others use too, threads wait for one another: small products can take ten times as long, and the
    order of the mixers changes. Where OMP_NUM_THREADS is set, that is kept.
    """
    import torch

    threads = torch.get_num_threads()
    if device.startswith("cuda") or threads == 1 or os.environ.get("OMP_NUM_THREADS"):
        return None
    x = torch.randn(8, SMALL, SMALL)

    def products() -> None:
        for _ in range(ROUNDS):
            (x @ x).mul_(2)

    together = cpu_clock(products), cpu_clock(products)
    torch.set_num_threads(1)
    alone = cpu_clock(products), cpu_clock(products)
    if min(alone) < min(together):
        return f"measured in 1 thread: {threads} are slower here now, as on a busy machine (OMP_NUM_THREADS sets them)"
    torch.set_num_threads(threads)
    return None


def slow_products(machine: Machine, dtype: str) -> str | None:
    """Return a remark where a processor multiplies in `dtype` far slower than in fp32, in which power attention does.

    Without units for it, products of fp16 are emulated: 1 GFLOP/s where fp32 reaches 190.
    """
    if machine.threads is None or dtype == "fp32":
        return None
    rate = machine.matmul_flops_per_s
    single = matmul_rate(machine.device, torch_dtype("fp32"), machine.clock)
    if 2 * rate > single:
        return None
    return (
        f"products in {dtype} run at {rate / 1e9:,.3g} GFLOP/s here, and at {single / 1e9:,.3g} in fp32, in which "
        "power attention computes: share and ideal compare with the former"
    )


def device_name(device: str) -> str:
    """Return what torch calls the GPU, or what is known of the processor."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str | None]:
    """Return the versions of torch and triton; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _in_catalogue(name: str) -> Device | None:
    try:
        return find_device(name)
    except InputError:
        return None
