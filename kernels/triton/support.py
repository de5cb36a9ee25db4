"""What the Triton kernels support, and the chunks they use where none are asked for. Imports no triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

LARGEST_KEY_DIM = {1: 128, 2: 128, 3: 64, 4: 32}
"""Largest head dim of q and k by degree: beyond it phi has more than 150,000 rows."""

LARGEST_VALUE_DIM = 128

LARGEST_IN_FP32 = 64
"""Largest head dim in float32, whose products run outside the matrix unit: blocks of 128 features spill.

For p = 1, where the state is one block, of q and k in fp16 too: its operands have 32 bits.
"""

INSTALLED = find_spec("triton") is not None
"""Found once: torch.compile could not trace the search before torch 2.7."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CHUNKS = {1: 256, 2: 1024, 3: 4096, 4: 4096}
"""Chunk size by degree where none is given.

Writing and reading a state costs 4 D V bytes a chunk in bf16: at 1,024 tokens (K = V = 64, p = 2) 576 bytes a token,
beside 512 for q, k, v and out.
"""


def lacking(q: Tensor, v: Tensor, p: int) -> str | None:
    """Return what stands in the way of running [B, T, H, K] queries and [B, T, G, V] values here, or None."""
    if not INSTALLED:
        return "needs the triton package, which is not installed (on Linux: pip install triton)"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on a CUDA device, and q is on {q.device}; on the CPU only under TRITON_INTERPRET=1, for tests"
    if q.dtype not in DTYPES:
        return f"takes {', '.join(str(dtype) for dtype in DTYPES)}, and q is {q.dtype}"
    narrow = q.dtype == torch.float32 or (p == 1 and q.dtype == torch.float16)
    largest = min(LARGEST_KEY_DIM[p], LARGEST_IN_FP32) if narrow else LARGEST_KEY_DIM[p]
    if q.shape[3] > largest:
        return f"takes head dims of q and k up to {largest} for p={p} in {q.dtype}, and it is {q.shape[3]}"
    largest = LARGEST_IN_FP32 if q.dtype == torch.float32 else LARGEST_VALUE_DIM
    if v.shape[3] > largest:
        return f"takes head dims of v up to {largest} in {q.dtype}, and it is {v.shape[3]}"
    return None
