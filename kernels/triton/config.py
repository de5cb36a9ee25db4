"""Block sizes of the kernels, and the types they compute in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
import triton.language as tl

from powerplan.kernels.triton.layout import power_of_two

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Names of the dtypes in blocks.json."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks that a kernel works on, and how it is compiled.

    Attributes:
        rows: Tokens of the block that a program owns, or, in the scan, of the blocks that it walks over.
        others: Tokens of the blocks that it walks over; 0 in the scan.
        warps: Warps of a program.
        stages: Loads that are under way at a time.
        steps: Steps of phi that a program of the scan owns; 1 in the other kernels.
    """

    rows: int
    others: int
    warps: int
    stages: int
    steps: int = 1

    def within(self, chunk_size: int) -> Blocks:
        """Return blocks no longer than a chunk."""
        longest = power_of_two(chunk_size)
        return Blocks(min(self.rows, longest), min(self.others, longest), self.warps, self.stages, self.steps)


def operand(dtype: torch.dtype) -> tuple[Any, str, torch.dtype]:
    """Return the type of the operands of products, their precision, and the dtype that states are stored in.

    bf16 operands stay bf16. fp16 operands become tf32, which has the same 10 bits of fraction and the range of float32:
    without that range, powers of scores would overflow or vanish. float32 operands stay float32.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee", torch.bfloat16
    return tl.float32, "tf32" if dtype == torch.float16 else "ieee", torch.float32


def family(device: torch.device) -> int:
    """Return 90 for GPUs with wgmma or its successor and 227 KB of shared memory, 80 for all others."""
    if device.type != "cuda":
        return 90  # Triton's interpreter on the CPU has no limits; any family does.
    return 90 if torch.cuda.get_device_capability(device) in ((9, 0), (10, 0), (10, 3)) else 80


def most_registers(count: int) -> dict[str, Any] | None:
    """Return the option of the compiler that sets the most registers of a thread. That for AMD GPUs has none."""
    return None if torch.version.hip is not None else {"maxnreg": count}


@lru_cache(maxsize=1)
def _table() -> dict[tuple[int, str, int], dict[tuple[int, int], dict[str, Blocks]]]:
    text = files("powerplan.kernels.triton").joinpath("blocks.json").read_text(encoding="utf-8")
    table: dict[tuple[int, str, int], dict[tuple[int, int], dict[str, Blocks]]] = {}
    for name, entry in json.loads(text).items():
        arch, dtype, p, head_dim, v_head_dim = name.split()
        by_kernel = {kernel: Blocks(*sizes) for kernel, sizes in entry.items()}
        table.setdefault((int(arch), dtype, int(p)), {})[int(head_dim), int(v_head_dim)] = by_kernel
    return table


def blocks(kernel: str, arch: int, p: int, head_dim: int, v_head_dim: int, dtype: torch.dtype) -> Blocks:
    """Return the blocks of "scan", "output", "queries" or "keys": those of the least head dims that hold these."""
    entries = _table()[arch, NAMES[dtype], p]
    return entries[min(dims for dims in entries if dims[0] >= head_dim and dims[1] >= v_head_dim)][kernel]
