"""What stays the same over a call of the kernels: shapes, where chunks begin, how a kernel starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from powerplan.kernels.plan import Plan
from powerplan.kernels.triton.config import Blocks, blocks, family, operand
from powerplan.kernels.triton.layout import power_of_two, step_count, step_rows


@dataclass(frozen=True)
class Shapes:
    """What stays the same over a call. B rows of T tokens, or N packed sequences in one row."""

    p: int
    scale: float
    chunk: int
    normalize: bool
    batch: int
    tokens: int
    groups: int
    repeats: int
    key_dim: int
    value_dim: int
    sequences: int
    dtype: torch.dtype
    arch: int

    @property
    def chunks(self) -> int:
        """Slots for chunks: exact for rows of one length, enough for packed sequences of any lengths."""
        if self.sequences == self.batch:
            return self.batch * -(-self.tokens // self.chunk)
        return self.tokens // self.chunk + self.sequences

    def blocks(self, kernel: str) -> Blocks:
        return blocks(kernel, self.arch, self.p, self.key_dim, self.value_dim, self.dtype).within(self.chunk)

    @property
    def rows(self) -> int:
        """Rows of phi, padded to what one program of the scan owns."""
        return step_rows(self.key_dim, self.p) * step_count(self.key_dim, self.p, self.scan_steps)

    @property
    def scan_steps(self) -> int:
        return 1 if self.p == 1 else self.blocks("scan").steps

    def constants(self) -> dict[str, Any]:
        """Return the constants that all kernels over chunks take."""
        kind, precision, _ = operand(self.dtype)
        return {
            "K": self.key_dim,
            "V": self.value_dim,
            "P": self.p,
            "BK": power_of_two(self.key_dim),
            "BV": power_of_two(self.value_dim),
            "REPEATS": self.repeats,
            "NORMALIZE": self.normalize,
            "OPERAND": kind,
            "PRECISION": precision,
        }


@dataclass(frozen=True)
class Pieces:
    """Where chunks and sequences begin: chunks [slots, 4] of first token, last token + 1, whether it is the first and
    the last of its sequence; first_chunk [N + 1]. Slots beyond the last chunk have no tokens."""

    chunks: Tensor
    first_chunk: Tensor


def pieces(bounds: Tensor, chunk: int, slots: int) -> Pieces:
    """Return the chunks of sequences bounds[i] : bounds[i + 1]. No value is read back from the device."""
    bounds = bounds.long()
    counts = (bounds[1:] - bounds[:-1] + chunk - 1) // chunk
    first_chunk = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    index = torch.arange(slots, device=bounds.device)
    owner = torch.searchsorted(first_chunk[1:].contiguous(), index, right=True).clamp(max=len(counts) - 1)
    within = index - first_chunk[owner]
    start = bounds[owner] + within * chunk
    stop = torch.minimum(start + chunk, bounds[owner + 1])
    real = index < first_chunk[-1]
    table = torch.stack((start, stop, (within == 0).long(), (within == counts[owner] - 1).long()), 1)
    return Pieces(torch.where(real[:, None], table, torch.zeros_like(table)), first_chunk)


@lru_cache(maxsize=64)
def dense_pieces(batch: int, tokens: int, chunk: int, slots: int, device: torch.device) -> Pieces:
    return pieces(torch.arange(batch + 1, device=device) * tokens, chunk, slots)


def launch(kernel: Any, programs: int, arguments: dict[str, Any], warps: int = 4, stages: int = 2) -> None:
    """Run `programs` programs of a kernel. The one place where kernels start: benchmarks/compiled.py listens here."""
    kernel[(programs,)](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def shapes_of(plan: Plan, sequences: int, q: Tensor) -> Shapes:
    """Return the plan with what these kernels need beside it."""
    return Shapes(**vars(plan), sequences=sequences, dtype=q.dtype, arch=family(q.device))


def kept(shapes: Shapes, keep: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes in which states and keys are kept for the backward pass."""
    _, _, stored = operand(shapes.dtype)
    size = (shapes.chunks, shapes.groups, shapes.rows)
    states = like.new_empty((*size, shapes.value_dim) if keep else (0,), dtype=stored)
    return states, like.new_empty(size if keep and shapes.normalize else (0,), dtype=torch.float32)


def tokens_first(x: Tensor) -> Tensor:
    """[B, T, heads, dim] -> [tokens, heads, dim] with features side by side; copies only where strides ask for it."""
    flat = x.flatten(0, 1)
    return flat if flat.stride(2) == 1 or flat.shape[2] == 1 else flat.contiguous()
