"""Which blocks a kernel takes: those of blocks.json, or under POWERPLAN_AUTOTUNE=1 the fastest of a list, timed once.

Timing waits for the GPU and makes the first call of a shape slow: some seconds for each kernel. Its choice holds until
the process ends. Without it a kernel takes what blocks.json says, the same blocks every time. So it does on Hopper with
a Triton that miscompiles some blocks (support.py, KEEPING_TRITON), too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from powerplan.kernels.triton.config import Blocks
from powerplan.kernels.triton.shapes import LaunchShape

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
    Blocks(32, 32, 8, 1),
    Blocks(32, 16, 8, 2),
    Blocks(32, 16, 8, 1),
    Blocks(16, 16, 8, 2),
    Blocks(16, 16, 8, 1),
    Blocks(16, 16, 4, 2),
]
"""Blocks of the kernels over tokens, from the largest to the smallest."""

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
"""Blocks to try by kernel, from the largest to the smallest.

The first of them that compiles without spilling registers is in blocks.json. The backward kernels hold more blocks at a
time than the output kernel, and start at 64 rows.
"""

_chosen: dict[tuple[str, LaunchShape], Blocks] = {}


def tuned(kernel: str, shape: LaunchShape, start_with: Callable[[Blocks], None]) -> Blocks:
    """Return the blocks to start a kernel with.

    Args:
        kernel: "scan", "output", "queries" or "keys".
        shape: Shape and settings of the call.
        start_with: Launches the kernel with given blocks, on the call's own tensors.
    """
    default = shape.blocks(kernel)
    if os.environ.get("POWERPLAN_AUTOTUNE") != "1" or shape.overwrites:
        return default
    # The blocks do not depend on how many tokens there are, once there are many.
    key = kernel, replace(shape, call=replace(shape.call, batch=1, tokens=0, scale=1.0), sequences=1)
    if key not in _chosen:
        times = {blocks: _time(blocks, start_with) for blocks in [default, *_others(kernel, shape, default)]}
        _chosen[key] = min(times, key=lambda blocks: times[blocks])
    return _chosen[key]


def _others(kernel: str, shape: LaunchShape, default: Blocks) -> list[Blocks]:
    """Return the candidates that fit the chunk and take as many steps as the default: the states' layout has these."""
    candidates = [
        blocks.within(shape.call.chunk_size) for blocks in CANDIDATES[kernel] if blocks.steps == default.steps
    ]
    return [blocks for blocks in dict.fromkeys(candidates) if blocks != default]


def _time(blocks: Blocks, start_with: Callable[[Blocks], None]) -> float:
    """Return the median time in ms; infinite where the blocks need more than the GPU has."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: start_with(blocks), warmup=5, rep=30, return_mode="median"))
    except OutOfResources:
        return float("inf")
