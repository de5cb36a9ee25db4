"""Layouts in which an outer product, made in registers, already is the left operand of wgmma.

wgmma takes its left operand [64, 16] from registers: thread 4 i + j of warp w holds the elements (16 w + i, 2 j), (16 w
+ i, 2 j + 1), the same 8 rows further down, and these four again 8 columns further right (PTX ISA, "Register fragments
for wgmma"). A linear layout says which element each bit of a thread's register index, its lane and its warp adds.
"""

from __future__ import annotations

from powerplan.kernels.triton.hopper.gluon import constexpr_function, gl

TILE = gl.constexpr(8)
"""Features of a tile."""

STEP = gl.constexpr(64)
"""Rows of a step: the products of two tiles."""


@constexpr_function
def rows_layout(rows, warps):
    """Return the layout of [rows, 8 lead, 8 last] whose reshape to [rows, 64] is the left operand."""
    registers = [[0, 0, 1], [8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    of_warps = [[16, 0, 0], [32, 0, 0]]
    size = 64
    while size < 16 * warps:
        of_warps.append([size, 0, 0])
        size *= 2
    while size < rows:
        registers.append([size, 0, 0])
        size *= 2
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [rows, 8, 8])


@constexpr_function
def lanes_layout(rows, warps):
    """Return `rows_layout` with the last tile's features as [4, 2]: 4 threads share a row, and each has 2 of them."""
    whole = rows_layout(rows, warps)

    def apart(bases):
        return [[row, lead, last // 2, last % 2] for row, lead, last in bases]

    bases = (whole.reg_bases, whole.lane_bases, whole.warp_bases)
    return gl.DistributedLinearLayout(*(apart(x) for x in bases), [], [rows, 8, 4, 2])


@constexpr_function
def time_layout(tokens):
    """Return the layout of [8 lead, 8 last, tokens] whose reshape to [64, tokens] is the left operand of 4 warps."""
    registers = [[0, 0, 1], [1, 0, 0], [0, 0, 8]]
    size = 16
    while size < tokens:
        registers.append([0, 0, size])
        size *= 2
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[2, 0, 0], [4, 0, 0]], [], [8, 8, tokens])


@constexpr_function
def sums_layout(columns, warps):
    """Return the layout of the sums of a product with this many columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16])


@constexpr_function
def tile_layout(columns):
    """Return the layout in shared memory of a tile of 16-bit values with this many columns, as wgmma reads it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)
