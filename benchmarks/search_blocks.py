"""Chooses the blocks of every kernel: the first of a list, from largest to smallest, that compiles without a fault.

Usage: python benchmarks/search_blocks.py [--workers 2] [--dtype bf16] [--p 2]
Rewrites kernels/triton/blocks.json (entries that were not searched stay). No GPU is needed, and none is timed: where a
GPU is at hand, what it prefers replaces an entry by hand, with the measurement in docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from compiled import Configuration, dims_of, faults, launches
from compiling import compile_all
from powerplan.kernels.triton import shapes
from powerplan.kernels.triton.config import Blocks
from powerplan.kernels.triton.tuning import CANDIDATES

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "triton" / "blocks.json"
Task = tuple[str, int, str, int, tuple[int, int]]


def search(task: Task) -> tuple[Task, Blocks | None]:
    """Return the first blocks of a kernel that no variant of the configuration faults with."""
    kernel, arch, dtype, p, (key_dim, value_dim) = task
    norm = p % 2 == 0
    variants = [
        Configuration(dtype, p, key_dim, value_dim, True, norm, carried=True),
        Configuration(dtype, p, key_dim, value_dim, True, norm, repeats=4),
        Configuration(dtype, p, key_dim, value_dim, False, False),
    ][: 1 if dtype == "fp32" else 3]
    for blocks in CANDIDATES[kernel]:
        if dtype != "bf16" and not narrow(blocks):
            continue

        def chosen(name: str, *_: Any, own: Blocks = blocks) -> Blocks:
            return own if name == kernel else Blocks(32, 32, 8, 2, 1)

        with patch.object(shapes, "blocks", chosen):
            if not any(wrong(variant, kernel, arch) for variant in variants):
                return task, blocks
    return task, None


def narrow(blocks: Blocks) -> bool:
    """Return whether to try blocks with operands of 32 bits: larger ones spill, and each takes seconds to compile."""
    return blocks.rows <= 64 and blocks.others <= 32 and blocks.steps == 1 and blocks.warps == 8


def wrong(config: Configuration, kernel: str, arch: int) -> bool:
    """Whether a kernel with these blocks has a fault, such as spilled registers, in any launch."""
    for launch in launches(config, arch):
        # One at a time: the first with a fault is enough, and each takes seconds.
        if launch.name == f"{kernel}_kernel" and faults(config, arch, launch.name, compile_all(arch, [launch])[0]):
            return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp16", "fp32"])
    parser.add_argument("--p", type=int, nargs="+", default=[1, 2, 3, 4])
    options = parser.parse_args()
    table: dict[str, dict[str, list[int]]] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    cases = [
        (arch, dtype, p, dims)
        for dtype in options.dtype
        for p in options.p
        for dims in dims_of(dtype, p)
        for arch in (90, 80)
    ]
    tasks = [(kernel, *case) for case, kernel in product(cases, CANDIDATES)]
    with ProcessPoolExecutor(options.workers, initializer=os.nice, initargs=(10,)) as pool:
        for (kernel, arch, dtype, p, (key_dim, value_dim)), blocks in pool.map(search, tasks):
            name = f"{arch} {dtype} {p} {key_dim} {value_dim}"
            print(name, kernel, blocks, flush=True)
            if blocks is None:
                return 1
            own = [blocks.rows, blocks.others, blocks.warps, blocks.stages, blocks.steps]
            table.setdefault(name, {})[kernel] = own
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(table.items())]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
