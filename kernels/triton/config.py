"""Block sizes of the kernels, and the types they compute in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from powerplan.kernels.triton.layout import power_of_two

@dataclass(frozen=True)
class Blocks:
    """rows: tokens of the block a program owns; others: of the block it walks over; steps: of phi, in the scan."""

    rows: int
    others: int
    warps: int
    stages: int
    steps: int = 1

    def within(self, chunk: int) -> Blocks:
        """Return blocks no longer than the chunk."""
        longest = power_of_two(chunk)
        return Blocks(min(self.rows, longest), min(self.others, longest), self.warps, self.stages, self.steps)


def operand(dtype: torch.dtype) -> tuple[Any, str, torch.dtype]:
    """Return the type of the operands of products, their precision, and the dtype that states are stored in.

    bf16 multiplies as it is. fp16 multiplies as tf32: the same 10 bits of fraction, and the range of float32, without
    which powers of scores would overflow or vanish. float32 multiplies as float32.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee", torch.bfloat16
    return tl.float32, "tf32" if dtype == torch.float16 else "ieee", torch.float32


def blocks(kernel: str, p: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> Blocks:
    """Return the blocks of "scan", "output", "queries" or "keys"."""
    wide = max(power_of_two(key_dim), power_of_two(value_dim)) > 64
    if dtype == torch.bfloat16:
        table = {
            "scan": Blocks(64, 0, 8, 3, 4) if not wide else Blocks(64, 0, 8, 3, 2),
            "output": Blocks(128, 64, 8, 3),
            "queries": Blocks(64, 64, 4, 2) if not wide else Blocks(64, 64, 8, 2),
            "keys": Blocks(64, 64, 4, 2) if not wide else Blocks(64, 64, 8, 2),
        }
    elif dtype == torch.float16:
        table = {
            "scan": Blocks(32, 0, 4, 2, 1),
            "output": Blocks(64, 32, 4, 2) if not wide else Blocks(64, 32, 8, 2),
            "queries": Blocks(64, 32, 8, 2),
            "keys": Blocks(64, 32, 8, 2),
        }
    else:
        table = {
            "scan": Blocks(32, 0, 8, 2, 1),
            "output": Blocks(32, 32, 8, 2),
            "queries": Blocks(32, 32, 8, 2),
            "keys": Blocks(32, 32, 8, 2),
        }
    return table[kernel]
