"""The states of all sequences and heads as the torch engine keeps them: in the blocks in which phi is expanded."""

from __future__ import annotations

import torch
from torch import Tensor

from powerplan.kernels.call import CallShape


class BlockedState:
    """B G states of D x W in one flat tensor, block after block: blocks[b] is [B G, W, rows of block b].

    A state that is not `filled` is 0, and its memory is not written: a sequence of one chunk has no use for it.
    """

    def __init__(self, shape: CallShape, flat: Tensor, filled: bool = True) -> None:
        self.shape, self.flat, self.filled = shape, flat, filled
        height, memory = shape.state_count * shape.state_columns, flat.view(-1)
        parts = [memory.narrow(0, height * block.first, height * block.width) for block in shape.tiling.blocks]
        self.blocks = [part.view(shape.state_count, shape.state_columns, -1) for part in parts]

    @staticmethod
    def of(shape: CallShape, rows: Tensor | None, like: Tensor) -> BlockedState:
        """Return a new state with the values of `rows`, [B G, D, W]; for None one of 0, of the dtype of `like`."""
        flat = like.new_empty(shape.state_count * shape.tiling.dim * shape.state_columns)
        state = BlockedState(shape, flat, filled=rows is not None)
        if rows is not None:
            for block, part in zip(shape.tiling.blocks, state.blocks, strict=True):
                part.copy_(rows[:, block.first : block.first + block.width].mT)
        return state

    def rows(self) -> Tensor:
        """Return the values, [B G, D, W]."""
        rows = torch.cat(self.blocks, 2).mT.contiguous()
        return rows if self.filled else rows.zero_()

    def copy(self) -> BlockedState:
        """Return a state of the same values in memory of its own."""
        return BlockedState(self.shape, self.flat.clone() if self.filled else torch.empty_like(self.flat), self.filled)

    def decay(self, factor: Tensor | None) -> None:
        """Multiply every state by its factor, [B G, 1, 1]; None is a factor of 1."""
        if factor is not None and self.filled:
            for block in self.blocks:
                block.mul_(factor)

    def add(self, index: int, left: Tensor, right: Tensor, weight: int = 1) -> None:
        """Add weight times `left` [B G, W, M] @ `right` [B G, M, rows] to block `index`.

        Blocks are added in order; with the last of them the state is filled.
        """
        self.blocks[index].baddbmm_(left, right, beta=int(self.filled), alpha=weight)
        self.filled = self.filled or index == len(self.blocks) - 1
