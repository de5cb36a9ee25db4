"""`--keep flops`: the same FLOPs per token as the model as it is, by more or fewer layers and heads.

Depth and width change together, so that width over depth stays as near as whole heads and layers allow.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd, log
from typing import Any

import msgspec

from powerplan.accounting import Accounting
from powerplan.ffn import MLP, AnyFFN, MoE
from powerplan.mixers import MLA, RWKV7, AnyMixer, Convention, GatedDeltaNet, GroupedHeads, Mamba1, Mamba2, Mixer
from powerplan.mixers.linear import MatrixState
from powerplan.recommend.choices import scopes
from powerplan.recommend.plan import Plan
from powerplan.spec import Layer, LayerGroup, ModelSpec

CLOSE = Fraction(1, 50)
"""Share by which the FLOPs may miss where that keeps the shape better: 2 %."""

LANKY = 2
"""Factor by which width over depth may change: few heads make coarse steps of width."""


def flops_per_token(spec: ModelSpec, context: int, convention: Convention) -> Fraction:
    """Return the forward FLOPs per token, weights and state."""
    accounting = Accounting(spec, convention)
    return accounting.weight_flops + accounting.state_flops(context)


def rescaled(base: ModelSpec, plan: Plan, goal: Fraction, context: int, convention: Convention) -> ModelSpec | None:
    """Return `base` with the plan in its layers, resized to `goal` FLOPs per token; None where heads forbid it."""
    first = plan.build(base)
    unit = _unit(first)
    if unit is None:
        return None
    growth = (float(goal) / float(flops_per_token(first, context, convention))) ** (1 / 3)
    middle = round(unit * growth)
    found: list[tuple[bool, float, float, ModelSpec]] = []
    for heads in range(max(1, middle - 2), middle + 3):
        widened = _widened(first, Fraction(heads, unit))
        if widened is None:
            continue
        depth = base.layer_count
        for _ in range(3):
            sized = _deepened(base, plan, depth, Fraction(heads, unit))
            if sized is None:
                break
            spent = flops_per_token(sized, context, convention)
            head = 2 * sum(term.value for term in sized.head_terms()) if convention.lm_head else 0
            miss = abs(float(spent / goal) - 1)
            aspect = (heads / unit) / (sized.layer_count / base.layer_count)
            if 1 / LANKY <= aspect <= LANKY:
                found.append((miss > CLOSE, abs(log(aspect)) if miss <= CLOSE else miss, miss, sized))
            if goal <= head:
                break
            depth = max(1, round((goal - head) / (spent - head) * sized.layer_count))
    return min(found, key=lambda item: item[:3])[3] if found else None


def resized_alike(base: ModelSpec, other: ModelSpec) -> ModelSpec | None:
    """Return `base` with its own mixers in the width and about the depth of `other`; None where heads forbid it."""
    width = Fraction(other.hidden_size, base.hidden_size)
    unit = _unit(base)
    if unit is None or (width * unit).denominator != 1:
        width = Fraction(round(width * unit), unit) if unit else width
    return _widened(_deeper(base, Fraction(other.layer_count, base.layer_count)), width) if unit and width else None


def _deeper(spec: ModelSpec, factor: Fraction) -> ModelSpec:
    groups = tuple(msgspec.structs.replace(group, repeat=max(1, round(group.repeat * factor))) for group in spec.layers)
    return msgspec.structs.replace(spec, layers=groups)


def _unit(spec: ModelSpec) -> int | None:
    """Return into how many equal parts the width divides: heads, in groups that share keys; None for one part."""
    widths = [use.layer.mixer for use in spec.layer_uses() if use.layer.mixer is not None]
    unit = gcd(spec.hidden_size, *(size for mixer in widths for size in _widths(mixer).values()))
    # B and C of Mamba-2 are shared by whole groups of heads, and there stay as many groups.
    unit = gcd(unit, *(mixer.heads // mixer.groups for mixer in widths if isinstance(mixer, Mamba2)))
    return unit if unit > 1 else None


def _widths(mixer: Mixer) -> dict[str, int]:
    """Return the fields of a mixer that grow with the width and stay whole."""
    if isinstance(mixer, GroupedHeads):
        return {"heads": mixer.heads} | ({"kv_heads": mixer.kv_heads} if mixer.kv_heads > 1 else {})
    if isinstance(mixer, GatedDeltaNet):
        return {"heads": mixer.heads, "key_heads": mixer.key_heads}
    if isinstance(mixer, (MLA, MatrixState, RWKV7, Mamba2)):
        return {"heads": mixer.heads}
    assert isinstance(mixer, Mamba1), f"{mixer.kind} has no rule for another width"
    return {"inner_size": mixer.inner_size}


RANKS = ("kv_lora_rank", "q_lora_rank", "decay_rank", "rate_rank", "value_rank", "dt_rank")
"""Fields of mixers that grow with the width and are rounded."""


def _deepened(base: ModelSpec, plan: Plan, depth: int, width: Fraction) -> ModelSpec | None:
    """Return the model of about `depth` layers and `width` times the heads, with the plan in the same proportion."""
    deep = _deeper(base, Fraction(depth, base.layer_count))
    if plan.unchanged:
        return _widened(deep, width)
    scope = next((scope for scope in scopes(deep) if scope.partial == plan.scope.partial), None)
    if scope is None or scope.classes != plan.scope.classes:
        return None
    count = round(plan.count * Fraction(len(scope.positions), len(plan.scope.positions)))
    if plan.is_mix and not 0 < 2 * count <= len(scope.positions):
        return None
    return _widened(Plan(scope, plan.main, plan.other, count).build(deep), width)


def _widened(spec: ModelSpec, width: Fraction) -> ModelSpec | None:
    """Return the model with `width` times the heads, hidden size and FFN; None where that is not whole."""
    hidden = spec.hidden_size * width
    if hidden.denominator != 1:
        return None

    def layer_of(layer: Layer) -> Layer:
        return Layer(mixer=_wider_mixer(layer.mixer, width), ffn=_wider_ffn(layer.ffn, width))

    groups = []
    for group in spec.layers:
        period = tuple(layer_of(layer) for layer in group.period)
        if group.pattern is None:
            groups.append(LayerGroup(repeat=group.repeat, mixer=period[0].mixer, ffn=period[0].ffn))
        else:
            groups.append(LayerGroup(repeat=group.repeat, pattern=period))
    return msgspec.structs.replace(spec, hidden_size=int(hidden), layers=tuple(groups))


def _wider_mixer(mixer: AnyMixer | None, width: Fraction) -> AnyMixer | None:
    if mixer is None:
        return None
    changed: dict[str, Any] = {field: int(size * width) for field, size in _widths(mixer).items()}
    ranks = (*RANKS, "gate_rank") if isinstance(mixer, RWKV7) else RANKS
    for field in ranks:
        if getattr(mixer, field, None) is not None:
            changed[field] = max(1, round(getattr(mixer, field) * width))
    return msgspec.structs.replace(mixer, **changed)


def _wider_ffn(ffn: AnyFFN | None, width: Fraction) -> AnyFFN | None:
    if ffn is None:
        return None
    changed: dict[str, Any] = {"intermediate_size": max(1, round(ffn.intermediate_size * width))}
    if isinstance(ffn, MoE) and ffn.shared_intermediate_size:
        changed["shared_intermediate_size"] = max(1, round(ffn.shared_intermediate_size * width))
    assert isinstance(ffn, MLP | MoE)
    return msgspec.structs.replace(ffn, **changed)
