"""Where the temporary tensors of a pass lie in one allocation: those that are not used at one time share memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 256
"""Tensors begin at multiples of this many bytes: enough for tensor descriptors, and for whole lines of a cache."""


class Use(NamedTuple):
    """When a temporary tensor is used: the first and the last step of the pass, and its size in bytes."""

    first: int
    last: int
    size: int

    def meets(self, other: Use) -> bool:
        """Return whether both are used at one time. A step may read one and write the other."""
        return self.first <= other.last and other.first <= self.last


def packed(uses: Sequence[Use]) -> tuple[list[int], int]:
    """Return the offset of each tensor, and the size of the allocation that holds all of them, both in bytes.

    The largest come first, each in the lowest place that is free for as long as it is used.
    """
    offsets = [0] * len(uses)
    placed: list[int] = []
    total = 0
    for index in sorted(range(len(uses)), key=lambda index: -uses[index].size):
        offset = 0
        others = sorted((offsets[other], other) for other in placed if uses[other].meets(uses[index]))
        for begin, other in others:
            if offset + _aligned(uses[index].size) <= begin:
                break
            offset = max(offset, begin + _aligned(uses[other].size))
        offsets[index] = offset
        placed.append(index)
        total = max(total, offset + _aligned(uses[index].size))
    return offsets, total


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
