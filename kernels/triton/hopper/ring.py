"""A ring of tiles of a state in shared memory, which one kernel fills by TMA while it multiplies."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from powerplan.kernels.triton.hopper.gluon import all_threads, copy_tile, gl
from powerplan.kernels.triton.hopper.layouts import STEP, TILE


@gluon.jit
def new_barriers(COUNT: gl.constexpr):
    """Return COUNT barriers that one copy or one group of copies completes."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), 1)
    # The unit that copies tiles sees shared memory through another proxy: without the fence it may meet barriers as
    # they were before. On an H100 that several processes shared, 9 of 23 of them then ended in an illegal access.
    fence_async_shared()
    all_threads()
    return bars


@gluon.jit
def load_ring_tile(desc, row, step, ring, bars, STEPS: gl.constexpr):
    """Start the copy of a step's tile into its place in the ring; nothing beyond the last step."""
    slot = step % ring.shape[0]
    wanted = step < STEPS
    mbarrier.expect(bars.index(slot), STEP * ring.shape[2] * 2, pred=wanted)
    copy_tile(desc, [row + step * STEP, 0], bars.index(slot), ring.index(slot), pred=wanted)


@gluon.jit
def wait_ring_tile(step, ring, bars):
    """Wait for a step's tile, and return it."""
    STAGES: gl.constexpr = ring.shape[0]
    mbarrier.wait(bars.index(step % STAGES), (step // STAGES) & 1)
    return ring.index(step % STAGES)


@gluon.jit
def store_tiles(
    p_x, s_xt, first, stop, x_tiles, DIM: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr
):
    """Copy ROWS tokens of x to shared memory as tiles [TILES, tokens, 8]; 0 where there is no token or feature."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    o_t = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    o_f = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT))
    for i_tile in gl.static_range(TILES):
        o_feature = i_tile * TILE + o_f
        mask = gl.expand_dims(o_t < stop, 1) & gl.expand_dims(o_feature < DIM, 0)
        offsets = gl.expand_dims(o_t.to(gl.int64) * s_xt, 1) + gl.expand_dims(o_feature, 0)
        x_tiles.index(i_tile).store(gl.load(p_x + offsets, mask=mask, other=0.0))


@gluon.jit
def state_decay(p_log_g_cumsum, o_t, stop, groups, i_group, power_scale, OF_KEYS: gl.constexpr, GATED: gl.constexpr):
    """Return power_scale times the decay between tokens and the state: exp(a_t), or of keys exp(a_M - a_t)."""
    b_decay = o_t.to(gl.float32) * 0.0 + power_scale
    if GATED:
        p_words = p_log_g_cumsum + (o_t * groups + i_group) * 2
        b_cumsum = gl.load(p_words, mask=o_t < stop, other=0.0)
        if OF_KEYS:
            p_total = p_log_g_cumsum + ((stop - 1) * groups + i_group) * 2
            b_rest = gl.load(p_total + 1) - gl.load(p_words + 1, mask=o_t < stop, other=0.0)
            b_cumsum = gl.where(o_t < stop, (gl.load(p_total) - b_cumsum) + b_rest, 0.0)
        b_decay = b_decay * gl.exp(b_cumsum)
    return b_decay
