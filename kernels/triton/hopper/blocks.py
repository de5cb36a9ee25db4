"""Block sizes of the kernels of this folder, the fastest of those timed on an H100 (benchmarks/NOTES.md has the times).

Timed were B1 T64k H8 with head dims 64 and 128. Other head dims take the blocks of the one that holds them. Three
programs of 128 threads fit on a multiprocessor where a thread takes up to 168 registers, and what one of them waits for
is hidden by the other two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from powerplan.kernels.triton.shapes import LaunchShape


class Blocks(NamedTuple):
    """Sizes of a kernel's blocks, and how it is compiled.

    rows: tokens that a program owns; of "states" tokens that a product sums over
    columns: tokens that it takes at a time; 0 where it walks over steps of phi
    warps: warps of a program
    stages: places of its rings
    registers: most registers of a thread; None for 255
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any] | None:
        """Options of the compiler, as `launch` takes them."""
        return None if self.registers is None else {"maxnreg": self.registers}


NARROW = {
    "states": Blocks(64, 0, 4, 4),
    "expand": Blocks(128, 0, 4, 3),
    "contract": Blocks(64, 0, 4, 3),
    "output": Blocks(64, 64, 4, 3),
    "queries": Blocks(64, 64, 4, 3, 168),
    "keys": Blocks(64, 64, 4, 3),
}
"""Blocks for head dims up to 64."""

WIDE = {
    "states": Blocks(64, 0, 4, 3),
    "expand": Blocks(128, 0, 8, 3),
    "contract": Blocks(64, 0, 4, 2),  # with 3 places one program fits on a multiprocessor, and not two
    "output": Blocks(64, 64, 4, 2),
    "queries": Blocks(64, 32, 4, 3),
    "keys": Blocks(64, 32, 4, 2),
}
"""Blocks for head dims up to 128."""


def blocks(kernel: str, shape: LaunchShape) -> Blocks:
    """Return the blocks of "states", "expand", "contract", "output", "queries" or "keys"."""
    wide = max(shape.phi_width, shape.stored_columns) == 128
    found = (WIDE if wide else NARROW)[kernel]
    return found._replace(rows=64, warps=4) if shape.call.chunk_size <= 64 else found


FIXED_NARROW = {"expand": Blocks(128, 0, 4, 3), "contract": Blocks(64, 0, 4, 3, 168)}
"""Blocks of the kernels for p = 3 and 4, for head dims of v up to 64: as for p = 2, which no GPU has confirmed."""

FIXED_WIDE = {"expand": Blocks(128, 0, 8, 3), "contract": Blocks(64, 0, 4, 2)}
"""Blocks of the kernels for p = 3 and 4, for head dims of v up to 128."""


def fixed_blocks(kernel: str, shape: LaunchShape) -> Blocks:
    """Return the blocks of "expand" or "contract" for p = 3 and 4."""
    found = (FIXED_WIDE if shape.stored_columns == 128 else FIXED_NARROW)[kernel]
    return found._replace(rows=64, warps=4) if shape.call.chunk_size <= 64 else found
