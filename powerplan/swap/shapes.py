"""Heads that a swap may name: those of the layers, and others of the same weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

from powerplan.mixers import HeadShape, Mixer
from powerplan.spec import ModelSpec

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 192, 256)
"""Key head dims that a recommendation may take. Matrix units want multiples of 16."""


def common_shape(mixers: Iterable[Mixer], hidden: int) -> HeadShape | None:
    """Return the heads of all `mixers`, as `Mixer.head_shape` gives them, where they are the same; else None."""
    shapes = {mixer.head_shape(hidden) for mixer in mixers}
    return shapes.pop() if len(shapes) == 1 else None


def replacement_heads(spec: ModelSpec) -> HeadShape | None:
    """Return the heads that a swap has to name so that the weights stay; None where those of the layers do.

    Only latent heads (MLA) need it. Layers that no other kind can replace do not count.
    """
    mixers = [mixer for mixer in spec.mixers() if mixer.swappable]
    return common_shape(mixers, spec.hidden_size) if any(mixer.latent_heads for mixer in mixers) else None


def same_weights(shape: HeadShape) -> list[HeadShape]:
    """Return the other shapes of the same projections: H k, G k, H v and G v stay, and so does every parameter."""
    shapes = []
    for dim in HEAD_DIMS:
        factor = Fraction(shape.head_dim, dim)
        heads, kv_heads, v_head_dim = shape.heads * factor, shape.kv_heads * factor, shape.v_head_dim / factor
        if factor != 1 and heads.denominator == kv_heads.denominator == v_head_dim.denominator == 1:
            shapes.append(HeadShape(int(heads), int(kv_heads), dim, int(v_head_dim)))
    return shapes


def fewer_kv_heads(shape: HeadShape) -> list[HeadShape]:
    """Return the shapes whose query heads share 1/2, 1/4 ... as many key/value heads: less state, smaller weights."""
    shapes = []
    while shape.kv_heads % 2 == 0:
        shape = replace(shape, kv_heads=shape.kv_heads // 2)
        shapes.append(shape)
    return shapes
