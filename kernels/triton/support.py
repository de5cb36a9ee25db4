"""What the Triton kernels support. Imports no triton, so that it can say that there is none."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from powerplan.dims import TRITON_HEAD_DIMS, TRITON_V_HEAD_DIM
from powerplan.kernels.checks import shown

LARGEST_IN_FP32 = 64
"""Largest head dim in float32, whose products run outside the matrix unit: blocks of 128 features spill registers.

It holds for q and k in float16 at p = 1 too. The state is one block there, and its operands have 32 bits.
"""

INSTALLED = find_spec("triton") is not None
"""Whether the triton package is there. Looked up once: torch.compile cannot trace the search before torch 2.7."""

HOPPER_TRITON = (3, 6)
"""The oldest version of triton that the Hopper engine takes.

Its kernels are written in Gluon, an experimental part of triton whose functions change from one version to the next.
3.6 is the oldest version that they ran with on an H100.
"""

UNTRIED_VARIABLE = "POWERPLAN_HOPPER"
"""The environment variable that lets the Hopper engine take what no GPU has run, too (dims.py: UNTRIED_...)."""

MISCOMPILING_TRITON = ((3, 4, 0), (3, 7, 0))
"""The first and the last version of triton that is known to miscompile products on Hopper.

A left operand that stays in registers over the iterations of a loop loses its registers to other values. The kernels
here make or load every left operand in the iteration that multiplies it.
"""

KEEPING_TRITON = (3, 9)
"""The oldest version of triton that is known to keep operands of products on Hopper in loops whose loads are pipelined.

With 3.6 to 3.8 a product may be under way when the next iteration begins, which makes its left operand anew: without
a word, and wrong on an H100. benchmarks/sass.py finds it in the scan without gates and in the output kernel in fp16.
Before 3.9, these loops are not pipelined there, and no blocks are tried that nobody has read.
"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that blocks.json has entries for."""


def lacking(q: Tensor, v: Tensor, p: int) -> str | None:
    """Return why the kernels cannot run on queries [B, T, H, K] and values [B, T, G, V] here, or None if they can."""
    if not INSTALLED:
        return "needs the triton package, which is not installed (on Linux: pip install triton)"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on a CUDA device, and q is on {q.device}; on the CPU only under TRITON_INTERPRET=1, for tests"
    if q.dtype not in DTYPES:
        return f"takes {', '.join(str(dtype) for dtype in DTYPES)}, and q is {q.dtype}"
    narrow = q.dtype == torch.float32 or (p == 1 and q.dtype == torch.float16)
    largest = min(TRITON_HEAD_DIMS[p], LARGEST_IN_FP32) if narrow else TRITON_HEAD_DIMS[p]
    if q.shape[3] > largest:
        return f"takes head dims of q and k up to {largest} for p={p} in {q.dtype}, and it is {q.shape[3]}"
    largest = LARGEST_IN_FP32 if q.dtype == torch.float32 else TRITON_V_HEAD_DIM
    if v.shape[3] > largest:
        return f"takes head dims of v up to {largest} in {q.dtype}, and it is {v.shape[3]}"
    return None


def triton_version() -> str | None:
    """Return the version of triton, or None where it is not installed. Imports triton."""
    if not INSTALLED:
        return None
    import triton

    return str(triton.__version__)


@lru_cache(maxsize=16)
def hopper_lacking(device: torch.device) -> str | None:
    """Return why the Hopper engine cannot run on a device with this triton, or None if it can.

    The reason follows the engine's name: "runs on ...", "needs ...". It is looked up once for each device. Triton is
    imported only where the device is a Hopper GPU.
    """
    gpus = "runs on NVIDIA GPUs of compute capability 9.0 (Hopper)"
    if device.type != "cuda":
        return f"{gpus}, and the device is {device}"
    if torch.version.hip is not None:  # MI200 has capability 9.0, too.
        return f"{gpus}, and torch is built for AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"{gpus}, and {device} has {capability[0]}.{capability[1]}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "does not run under TRITON_INTERPRET=1: Triton's interpreter does not know Gluon"
    found = triton_version()
    least = ".".join(map(str, HOPPER_TRITON))
    if found is None:
        return f"needs triton {least} or newer, which is not installed (on Linux: pip install 'triton>={least}')"
    if _numbers(found) < HOPPER_TRITON:
        return f"needs triton {least} or newer for its Gluon, and {found} is installed"
    return None


@lru_cache(maxsize=1)
def takes_untried() -> bool:
    """Return whether the Hopper engine takes calls whose kernels no GPU has run: where POWERPLAN_HOPPER is all.

    It is read once: a backward pass reads states that the forward pass has saved, in the layout of its engine.

    Raises:
        ValueError: The variable has another value.
    """
    value = os.environ.get(UNTRIED_VARIABLE, "")
    if value not in ("", "all"):
        raise ValueError(f"{UNTRIED_VARIABLE} is {shown(value)}: set it to all, or not at all")
    return value == "all"


def miscompiles(version: str) -> bool:
    """Return whether this version of triton is known to miscompile products on Hopper (MISCOMPILING_TRITON)."""
    first, last = MISCOMPILING_TRITON
    return first <= _numbers(version) <= last


def overwrites(version: str, arch: int) -> bool:
    """Return whether a triton may overwrite operands on a family of GPUs (KEEPING_TRITON)."""
    return arch == 90 and _numbers(version) < KEEPING_TRITON


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (3, 6, 0) for 3.6.0+git1a2b, and zeros where it has none."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return (0, 0, 0) if found is None else tuple(int(number or 0) for number in found.groups())
