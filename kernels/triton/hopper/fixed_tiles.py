"""x in shared memory as rows of features, for p = 3 and 4, where steps of phi take single features of x as well."""

from __future__ import annotations

from triton.experimental import gluon

from powerplan.kernels.triton.hopper.gluon import gl, viewed_as
from powerplan.kernels.triton.hopper.layouts import TILE

ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
"""Layout of a row: the values of one feature for all tokens of a program, side by side."""


@gluon.jit
def tile_of(rows, i_tile, TILES: gl.constexpr):
    """Return the view [tokens, 8] of a tile of rows [8 TILES, tokens]."""
    COUNT: gl.constexpr = rows.shape[1]
    tiles = viewed_as(rows, TILES, TILE, COUNT, gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    return tiles.index(i_tile).permute((1, 0))


@gluon.jit
def store_rows(p_x, s_xt, first, stop, rows, DIM: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr):
    """Copy tokens of x to rows [8 TILES, tokens] in shared memory; 0 where there is no token or feature."""
    COUNT: gl.constexpr = rows.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    o_t = first + gl.arange(0, COUNT, gl.SliceLayout(1, LAYOUT))
    o_f = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT))
    for i_tile in gl.static_range(TILES):
        o_feature = i_tile * TILE + o_f
        mask = gl.expand_dims(o_t < stop, 1) & gl.expand_dims(o_feature < DIM, 0)
        offsets = gl.expand_dims(o_t.to(gl.int64) * s_xt, 1) + gl.expand_dims(o_feature, 0)
        tile_of(rows, i_tile, TILES).store(gl.load(p_x + offsets, mask=mask, other=0.0))


@gluon.jit
def outer_features(inner, P: gl.constexpr):
    """Return how many features the first fixed one may be: 1, which stands for none, for P = 3."""
    count = inner * 0 + 1
    if P == 4:
        count = (inner + 1) * TILE
    return count
