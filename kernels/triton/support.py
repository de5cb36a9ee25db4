"""What the Triton kernels support. Imports no triton, so that it can say that there is none."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

LARGEST_HEAD_DIM = {1: 128, 2: 128, 3: 64, 4: 32}
"""Largest head dim of q and k by degree, as blocks.json has entries for.

Beyond it phi has at least 84,480 rows for p = 3 (head dim 72) and 286,720 for p = 4 (head dim 40).
"""

LARGEST_V_HEAD_DIM = 128
"""Largest head dim of v, as blocks.json has entries for."""

LARGEST_IN_FP32 = 64
"""Largest head dim in float32, whose products run outside the matrix unit: blocks of 128 features spill registers.

It holds for q and k in float16 at p = 1 too. The state is one block there, and its operands have 32 bits.
"""

INSTALLED = find_spec("triton") is not None
"""Whether the triton package is there. Looked up once: torch.compile cannot trace the search before torch 2.7."""

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
    largest = min(LARGEST_HEAD_DIM[p], LARGEST_IN_FP32) if narrow else LARGEST_HEAD_DIM[p]
    if q.shape[3] > largest:
        return f"takes head dims of q and k up to {largest} for p={p} in {q.dtype}, and it is {q.shape[3]}"
    largest = LARGEST_IN_FP32 if q.dtype == torch.float32 else LARGEST_V_HEAD_DIM
    if v.shape[3] > largest:
        return f"takes head dims of v up to {largest} in {q.dtype}, and it is {v.shape[3]}"
    return None


def hopper_lacking(device: torch.device) -> str | None:
    """Return why the kernels of hopper/ cannot run on a device, or None if they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    return None
