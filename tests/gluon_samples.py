"""Gluon kernels for sm_90 that tests emulate and compile: right ones, and each with a fault that FAULT names."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.constexpr_function
def outer_layout():
    """[64 rows, 8, 8], whose reshape to [64, 64] is a left operand of wgmma on 4 warps."""
    registers = [[0, 0, 1], [8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, 8, 8])


@gluon.jit
def load_step(b_desc, bars, ring, step, steps, STAGES: gl.constexpr, FAULT: gl.constexpr):
    slot = step % STAGES
    size: gl.constexpr = b_desc.block_type.nbytes
    if FAULT == "bytes":
        mbarrier.expect(bars.index(slot), size // 2, pred=step < steps)
    else:
        mbarrier.expect(bars.index(slot), size, pred=step < steps)
    copy_tile(b_desc, [step * 64, 0], bars.index(slot), ring.index(slot), pred=(step < steps) or (FAULT == "left"))


@gluon.jit
def add_step(
    b_desc, bars, ring, lead, last, step, steps, acc, MMA: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr
):
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    outer = gl.expand_dims(lead, 2) * gl.expand_dims(last, 1)
    left = gl.convert_layout(gl.reshape(outer, [64, 64]), A, assert_trivial=True)
    parity = (step // STAGES) & 1
    if FAULT == "parity":
        mbarrier.wait(bars.index(step % STAGES), parity ^ 1)
    elif FAULT != "no wait":
        mbarrier.wait(bars.index(step % STAGES), parity)
    acc = warpgroup_mma(left, ring.index(step % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    if FAULT == "slot":
        load_step(b_desc, bars, ring, step + STAGES, steps, STAGES, FAULT)
    else:
        # The product before is complete, so its tile is free.
        load_step(b_desc, bars, ring, step + STAGES - 1, steps, STAGES, FAULT)
    return acc


@gluon.jit
def outer_kernel(
    b_desc, o_desc, p_x, p_y, rows, TILES: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr
):
    """out [rows, V] = sum over tiles a, b of 8 of outer(x tile a, y tile b) B[a, b]; x, y [rows, 8 TILES]."""
    L3: gl.constexpr = outer_layout()
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    dtype: gl.constexpr = b_desc.dtype
    x_tiles = gl.allocate_shared_memory(dtype, [TILES, 64, 8], PLAIN)
    y_tiles = gl.allocate_shared_memory(dtype, [TILES, 64, 8], PLAIN)
    ring = gl.allocate_shared_memory(dtype, [STAGES, 64, V], b_desc.layout)
    out = gl.allocate_shared_memory(gl.float32, [64, V], o_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), 1)
    for i in gl.static_range(STAGES - 1 if FAULT != "slot" else STAGES):
        load_step(b_desc, bars, ring, i, TILES * TILES, STAGES, FAULT)
    first = gl.program_id(0) * 64
    row = first + gl.arange(0, 64, gl.SliceLayout(1, LOAD))
    column = gl.arange(0, 8, gl.SliceLayout(0, LOAD))
    place = row[:, None] * (8 * TILES) + column[None, :]
    inside = (row < rows)[:, None] & (column >= 0)[None, :]
    if FAULT == "mask":
        inside = (row >= 0)[:, None] & (column >= 0)[None, :]
    for i in gl.static_range(TILES):
        x_tiles.index(i).store(gl.load(p_x + place + i * 8, mask=inside, other=0.0))
        y_tiles.index(i).store(gl.load(p_y + place + i * 8, mask=inside, other=0.0))
    acc = gl.zeros([64, V], gl.float32, MMA)
    steps: gl.constexpr = TILES * TILES
    for a in range(TILES):
        lead = x_tiles.index(a).load(gl.SliceLayout(2, L3))
        if FAULT == "rolled":
            for b in range(TILES):
                last = y_tiles.index(b).load(gl.SliceLayout(1, L3))
                acc = add_step(b_desc, bars, ring, lead, last, a * TILES + b, steps, acc, MMA, STAGES, FAULT)
        else:
            for b in gl.static_range(TILES):
                last = y_tiles.index(b).load(gl.SliceLayout(1, L3))
                acc = add_step(b_desc, bars, ring, lead, last, a * TILES + b, steps, acc, MMA, STAGES, FAULT)
    if FAULT != "early":
        acc = warpgroup_mma_wait(0, deps=[acc])
    out.store(acc)
    if FAULT != "fence":
        fence_async_shared()
    store_tile(o_desc, [first, 0], out)
    if FAULT != "store":
        tma.store_wait(0)


@gluon.jit
def chain_kernel(p_x, p_v, p_out, blocks, FAULT: gl.constexpr):
    """out [64, 64] = sum of the squares of x[b] [64, 64], rounded to bf16, times v[b] [64, 64].

    The squares of one block are made while the product of the block before runs.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], TILE)
    row = gl.arange(0, 64, gl.SliceLayout(1, LOAD))
    place = row[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, LOAD))[None, :]
    o_m = gl.arange(0, 64, gl.SliceLayout(1, MMA))
    o_place = o_m[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, MMA))[None, :]
    acc = gl.zeros([64, 64], gl.float32, MMA)
    x = gl.load(p_x + o_place).to(gl.float32)
    square = gl.convert_layout((x * x).to(gl.bfloat16), A, assert_trivial=True)
    for b in range(1, blocks):
        tiles.index((b - 1) % 2).store(gl.load(p_v + (b - 1) * 4096 + place))
        fence_async_shared()
        at = warpgroup_mma(square, tiles.index((b - 1) % 2), acc, is_async=True)
        x = gl.load(p_x + b * 4096 + o_place).to(gl.float32)
        new = gl.convert_layout((x * x).to(gl.bfloat16), A, assert_trivial=True)
        if FAULT == "unnamed":
            acc = warpgroup_mma_wait(0, deps=[at])
        elif FAULT == "late":
            acc = warpgroup_mma_wait(1, deps=[at])
        else:
            acc, square = warpgroup_mma_wait(0, deps=[at, square])
        square = new
    tiles.index((blocks - 1) % 2).store(gl.load(p_v + (blocks - 1) * 4096 + place))
    fence_async_shared()
    acc = warpgroup_mma(square, tiles.index((blocks - 1) % 2), acc)
    gl.store(p_out + o_place, acc)


@gluon.jit
def pieces_kernel(p_x, p_out, SCALE: gl.constexpr):
    """x [8, 16] -> [4, 8, 16]: through two views of shared memory, and a few functions of single elements."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [2, 2], [1, 0])
    row = gl.arange(0, 8, gl.SliceLayout(1, L))
    place = row[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, L))[None, :]
    x = gl.load(p_x + place)
    kept = x
    x *= SCALE
    gl.store(p_out + place, x - kept)
    memory = gl.allocate_shared_memory(gl.float32, [2, 8, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    TURNED: gl.constexpr = gl.SharedLinearLayout([[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [0, 8]])
    memory._reinterpret(gl.float32, [8, 16], TURNED).store(kept)
    found = memory._reinterpret(gl.float32, [8, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).load(L)
    gl.store(p_out + 128 + place, found)
    even, odd = gl.split(gl.reshape(kept, [8, 8, 2]))
    gl.store(p_out + 256 + place, gl.reshape(gl.join(odd, even), [8, 16]))
    power = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [kept], dtype=gl.float32, is_pure=True, pack=1
    )
    gl.store(p_out + 384 + place, gl.fma(power, power, gl.where(place % 2 == 0, power, 0.0)))


@triton.jit
def twice_kernel(p_x, p_out, n, BLOCK: tl.constexpr):
    """A plain Triton kernel beside Gluon's: out [n] = 2 x."""
    for i in range(n):
        x = tl.load(p_x + i * BLOCK + tl.arange(0, BLOCK))
        tl.store(p_out + i * BLOCK + tl.arange(0, BLOCK), 2 * x)
