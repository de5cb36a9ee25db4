"""`--keep flops`: as many FLOPs per token as the model as it is, by more or fewer layers and heads.

Depth and width change together, so that width over depth stays as near as whole heads and layers allow.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd, log

import msgspec

from powerplan.accounting import Accounting
from powerplan.mixers import Convention
from powerplan.mixers.formulas import total
from powerplan.search.choices import scopes
from powerplan.search.layer_plan import LayerPlan
from powerplan.spec import Layer, ModelSpec

FLOPS_TOLERANCE = Fraction(1, 50)
"""Share by which the FLOPs may miss where that keeps the shape better: 2 %."""

MOST_ASPECT_CHANGE = 2
"""Factor by which width over depth may change: few heads make coarse steps of width."""


def resized(base: ModelSpec, plan: LayerPlan, goal: Fraction, context: int, convention: Convention) -> ModelSpec | None:
    """Return `base` with the plan in its layers, resized to `goal` FLOPs per token; None where heads forbid it."""
    first = plan.build(base)
    parts = _width_parts(first)
    if parts is None:
        return None
    # FLOPs grow about as width^2 times depth, and both grow by the same factor.
    growth = (float(goal) / float(Accounting(first, convention).row(context).flops_per_token)) ** (1 / 3)
    middle = round(parts * growth)
    sizes: list[tuple[bool, float, float, ModelSpec]] = []
    for heads in range(max(1, middle - 2), middle + 3):
        width = Fraction(heads, parts)
        if _widened(first, width) is None:
            continue
        depth = base.layer_count
        for _ in range(3):
            model = _deepened(base, plan, depth, width)
            if model is None:
                break
            flops = Accounting(model, convention).row(context).flops_per_token
            head = 2 * total(model.head_terms()) if convention.lm_head else 0
            miss = abs(float(flops / goal) - 1)
            aspect = (heads / parts) / (model.layer_count / base.layer_count)
            if 1 / MOST_ASPECT_CHANGE <= aspect <= MOST_ASPECT_CHANGE:
                far = miss > FLOPS_TOLERANCE
                sizes.append((far, miss if far else abs(log(aspect)), miss, model))
            if goal <= head:
                break
            depth = max(1, round((goal - head) / (flops - head) * model.layer_count))
    return min(sizes, key=lambda size: size[:3])[3] if sizes else None


def resized_alike(base: ModelSpec, other: ModelSpec) -> ModelSpec | None:
    """Return `base` with its own mixers in the width and about the depth of `other`; None where heads forbid it."""
    parts = _width_parts(base)
    width = Fraction(round(Fraction(other.hidden_size, base.hidden_size) * parts), parts) if parts else None
    return _widened(_deeper(base, Fraction(other.layer_count, base.layer_count)), width) if width else None


def _deeper(spec: ModelSpec, factor: Fraction) -> ModelSpec:
    groups = tuple(msgspec.structs.replace(group, repeat=max(1, round(group.repeat * factor))) for group in spec.layers)
    return msgspec.structs.replace(spec, layers=groups)


def _width_parts(spec: ModelSpec) -> int | None:
    """Return into how many equal parts the width divides, with whole heads in each; None for one part."""
    parts = gcd(spec.hidden_size, *(mixer.width_divisor() for mixer in spec.mixers()))
    return parts if parts > 1 else None


def _deepened(base: ModelSpec, plan: LayerPlan, depth: int, width: Fraction) -> ModelSpec | None:
    """Return the model of about `depth` layers and `width` times the heads, with the plan in the same proportion."""
    deep = _deeper(base, Fraction(depth, base.layer_count))
    if plan.unchanged:
        return _widened(deep, width)
    scope = next((scope for scope in scopes(deep) if scope.partial == plan.scope.partial), None)
    if scope is None or scope.distinct != plan.scope.distinct:
        return None
    count = round(plan.count * Fraction(len(scope.positions), plan.layers))
    if plan.is_mix and not 0 < 2 * count <= len(scope.positions):
        return None
    return _widened(LayerPlan(scope, plan.main, plan.other, count).build(deep), width)


def _widened(spec: ModelSpec, width: Fraction) -> ModelSpec | None:
    """Return the model with `width` times the heads, hidden size and FFN; None where that is not whole."""
    hidden = spec.hidden_size * width
    if hidden.denominator != 1:
        return None

    def wider(layer: Layer) -> Layer:
        mixer, ffn = layer.mixer, layer.ffn
        return msgspec.structs.replace(layer, mixer=mixer and mixer.widened(width), ffn=ffn and ffn.widened(width))

    return msgspec.structs.replace(spec.map_layers(wider), hidden_size=int(hidden))
