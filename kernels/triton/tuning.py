"""Which blocks a kernel takes: those of blocks.json, or under POWERPLAN_AUTOTUNE=1 the fastest of a list, timed once.

Timing waits for the GPU and makes the first call of a shape slow, some seconds for each kernel. What it finds holds
for the process. The default is what blocks.json says: the same every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from powerplan.kernels.triton.config import Blocks
from powerplan.kernels.triton.shapes import Shapes

BLOCKS = [
    Blocks(128, 64, 8, 3),
    Blocks(128, 64, 8, 2),
    Blocks(128, 32, 8, 2),
    Blocks(64, 64, 4, 3),
    Blocks(64, 64, 4, 2),
    Blocks(64, 64, 8, 2),
    Blocks(64, 32, 4, 2),
    Blocks(64, 32, 8, 2),
    Blocks(64, 32, 8, 1),
    Blocks(64, 16, 8, 2),
    Blocks(32, 32, 4, 2),
    Blocks(32, 32, 8, 2),
    Blocks(32, 16, 8, 2),
    Blocks(32, 16, 8, 1),
    Blocks(16, 16, 8, 2),
    Blocks(16, 16, 8, 1),
    Blocks(16, 16, 4, 2),
]
CANDIDATES = {
    "scan": [
        Blocks(64, 0, 8, 3, 4),
        Blocks(32, 0, 8, 3, 4),
        Blocks(64, 0, 8, 3, 2),
        Blocks(64, 0, 4, 3, 2),
        Blocks(64, 0, 4, 2, 2),
        Blocks(32, 0, 4, 3, 2),
        Blocks(32, 0, 8, 2, 2),
        Blocks(64, 0, 4, 3, 1),
        Blocks(64, 0, 8, 3, 1),
        Blocks(32, 0, 4, 2, 1),
        Blocks(32, 0, 8, 2, 1),
        Blocks(16, 0, 8, 2, 1),
    ],
    "output": BLOCKS,
    "queries": BLOCKS[3:],
    "keys": BLOCKS[3:],
}
"""From the largest to the smallest. The first of them that compiles without spills is in blocks.json."""

_found: dict[tuple[str, Shapes], Blocks] = {}


def tuned(kernel: str, shapes: Shapes, start_with: Callable[[Blocks], None]) -> Blocks:
    """Return the blocks to start a kernel with. start_with launches it, on the call's own tensors."""
    default = shapes.blocks(kernel)
    if os.environ.get("POWERPLAN_AUTOTUNE") != "1":
        return default
    # The blocks do not depend on how many tokens there are, once there are many.
    key = kernel, replace(shapes, batch=1, sequences=1, tokens=0, scale=1.0)
    if key not in _found:
        times = {blocks: _time(blocks, start_with) for blocks in [default, *_others(kernel, shapes, default)]}
        _found[key] = min(times, key=lambda blocks: times[blocks])
    return _found[key]


def _others(kernel: str, shapes: Shapes, default: Blocks) -> list[Blocks]:
    """Return the candidates within the chunk that keep the steps of the default: the states' layout hangs on them."""
    found = {blocks.within(shapes.chunk): None for blocks in CANDIDATES[kernel] if blocks.steps == default.steps}
    return [blocks for blocks in found if blocks != default]


def _time(blocks: Blocks, start_with: Callable[[Blocks], None]) -> float:
    """Return the median time in ms; infinite where the GPU has not got the room."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: start_with(blocks), warmup=5, rep=30, return_mode="median"))
    except OutOfResources:
        return float("inf")
