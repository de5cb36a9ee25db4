"""What a chunked call is made of: its sizes, the layout of phi, and the state as blocks of it.

Legend of plan.py, chunk.py and chunked.py: B sequences, T tokens, G key/value heads, R query heads to each, K and V
head dims; M tokens of a chunk, N = B G, W = V and one column of ones for the normaliser, D rows of phi.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from powerplan.kernels.tiles import Tiling, tiling

BLOCK_ROWS = 600
"""Rows of phi expanded at a time: 2.5 MB at 4 heads and chunks of 256, where 300 was as fast and 900 slower (two cores
of 1 MB L2 each, K = V = 64, p = 2)."""

TILE = 8

EVERY = 8
"""The backward pass stores the state before each EVERY-th chunk and recomputes those between.

At K = V = 64, p = 2 that is 293 bytes per token and key/value head with chunks of 256, less than q, k and v take.
"""


@dataclass(frozen=True)
class Plan:
    """What stays the same over a call. d is K padded to whole tiles; columns is W."""

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

    @property
    def tile(self) -> int:
        return min(TILE, self.key_dim)

    @property
    def d(self) -> int:
        return -(-self.key_dim // self.tile) * self.tile

    @property
    def layout(self) -> Tiling:
        return tiling(self.d, self.p, self.tile, BLOCK_ROWS)

    @property
    def columns(self) -> int:
        return self.value_dim + int(self.normalize)

    @property
    def count(self) -> int:
        return self.batch * self.groups

    def chunks(self) -> list[slice]:
        return [slice(start, min(start + self.chunk, self.tokens)) for start in range(0, self.tokens, self.chunk)]

    def room(self, like: Tensor) -> Tensor:
        """Return room for one block of phi, flat."""
        rows = max(block.width for block in self.layout.blocks)
        return like.new_empty(self.count * rows * self.repeats * min(self.chunk, self.tokens))


class State:
    """N states of D x W, in one flat tensor block by block: blocks[b] is [N, W, rows].

    Until something is `seen` they are empty, and their memory is not written: one chunk alone has no use for it.
    """

    def __init__(self, plan: Plan, flat: Tensor, seen: bool = True) -> None:
        self.plan, self.flat, self.seen = plan, flat, seen
        height, whole = plan.count * plan.columns, flat.view(-1)
        parts = [whole.narrow(0, height * block.first, height * block.width) for block in plan.layout.blocks]
        self.blocks = [part.view(plan.count, plan.columns, -1) for part in parts]

    @staticmethod
    def of(plan: Plan, whole: Tensor | None, like: Tensor) -> State:
        """Return `whole`, [N, D, W], as a new State; an empty one for None, of the dtype of `like`."""
        flat = like.new_empty(plan.count * plan.layout.dim * plan.columns)
        state = State(plan, flat, seen=whole is not None)
        if whole is not None:
            for block, part in zip(plan.layout.blocks, state.blocks, strict=True):
                part.copy_(whole[:, block.first : block.first + block.width].mT)
        return state

    def whole(self) -> Tensor:
        """Return [N, D, W]."""
        whole = torch.cat(self.blocks, 2).mT.contiguous()
        return whole if self.seen else whole.zero_()

    def copy(self) -> State:
        """Return a State of its own memory."""
        return State(self.plan, self.flat.clone() if self.seen else torch.empty_like(self.flat), self.seen)

    def decay(self, factor: Tensor | None) -> None:
        """Multiply all by [N, 1, 1]."""
        if factor is not None and self.seen:
            for block in self.blocks:
                block.mul_(factor)

    def add(self, index: int, left: Tensor, right: Tensor, weight: int = 1) -> None:
        """Add `left` @ `right` times `weight` to block `index`; the last block makes the state a seen one."""
        self.blocks[index].baddbmm_(left, right, beta=int(self.seen), alpha=weight)
        self.seen = self.seen or index == len(self.blocks) - 1
