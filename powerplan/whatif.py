"""`--mixer`: the same model with another sequence mixer in every layer."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from powerplan.errors import InputError, allowed_values, shown
from powerplan.mixers import HEADED, MIXERS, MLA, RWKV7, AnyMixer, FeatureAttention, GroupedHeads, Mixer
from powerplan.mixers.linear import MatrixState
from powerplan.spec import LENGTHS, MAX_NAME, ModelSpec
from powerplan.units import parse_context
from powerplan.validation import plain_problem, words_of

KINDS = sorted(MIXERS)

_WORDS = {"true": True, "false": False}
_WHERE = "--mixer"
_ASKED = frozenset({"window", "p"})
"""Fields that are the question itself, and so not taken over from another kind, nor by attention from itself."""


def with_mixer(spec: ModelSpec, text: str) -> tuple[ModelSpec, list[str]]:
    """Return `spec` with the mixer that `text` describes in every layer, and remarks on what was assumed.

    `text` is a kind with settings: attention, window:4096, power:p=2, power:p=2,gated=true, linear, kda. A layer of
    that kind keeps its fields. Elsewhere heads and head dims stay as they are where both kinds have query and
    key/value heads, and the rest (a gate, a chunk size) is as in the first such layer of the model, so that one kind is
    one kind in all of them; other layers become like that one altogether, or, where there is none, like the kind's
    published model.
    Raises InputError for an unknown kind or setting.
    """
    kind, settings = parse_mixer(text)
    known = first_of(spec, kind)
    notes: list[str] = []

    def change(mixer: Mixer) -> AnyMixer:
        changed, remarks = swapped(mixer, kind, settings, spec.hidden_size, known)
        notes.extend(remark for remark in remarks if remark not in notes)
        return changed

    return renamed(spec.map_mixers(change), spec.name, text), notes


def first_of(spec: ModelSpec, kind: str) -> Mixer | None:
    """Return the first mixer of `kind` in a model, what `swapped` takes as `known`.

    Else, for power and linear attention, the first of the other one: they have gates and chunks in common.
    """
    mixers = [use.layer.mixer for use in spec.layer_uses() if use.layer.mixer is not None]
    alike = FeatureAttention if issubclass(MIXERS[kind], FeatureAttention) else MIXERS[kind]
    found = [mixer for mixer in mixers if type(mixer) is MIXERS[kind]]
    return next(iter([*found, *(mixer for mixer in mixers if isinstance(mixer, alike))]), None)


def swapped(
    mixer: Mixer, kind: str, settings: dict[str, Any], hidden: int = 0, known: Mixer | None = None
) -> tuple[AnyMixer, list[str]]:
    """Return the mixer of `kind` that takes over from `mixer` what is not set, and remarks on what was assumed.

    hidden: the model's width, for kinds and mixers that do not have heads. known: what `first_of` has.
    """
    shape, remarks = _shape(mixer, kind, hidden, known, {"heads", "head_dim"} <= settings.keys())
    try:
        changed: AnyMixer = msgspec.convert({"kind": kind, **shape, **settings}, AnyMixer)
    except msgspec.ValidationError as error:
        raise InputError(_problem(str(error), kind, settings), _WHERE) from None
    return changed, remarks


def renamed(spec: ModelSpec, name: str, text: str) -> ModelSpec:
    """Return a variant of the model `name` under a name of its own, without what was published about the model."""
    label = f"{name} with {' '.join(text.split())}"
    return msgspec.structs.replace(spec, name=label[:MAX_NAME], aliases=(), published=None)


def _problem(message: str, kind: str, settings: dict[str, Any]) -> str:
    text, at_field, where = message.partition(" - at `$.")
    if not at_field:
        field, colon, problem = text.partition(": ")
        return f"{problem} (what is not set stays as the model has it)" if colon and field in problem else text
    field = where.rstrip("`")
    return f"{field}: {plain_problem(text, settings.get(field), words_of(MIXERS[kind], field))}"


def parse_mixer(text: str) -> tuple[str, dict[str, Any]]:
    """Return the kind and the settings of a `--mixer` value; "window:4096" is attention with that window."""
    kind, _, rest = text.strip().partition(":")
    if kind == "window" and not rest:
        raise InputError("window needs its size; write window:4096", _WHERE)
    if kind == "window":
        return "attention", {"window": parse_context(rest, f"{_WHERE} window")}
    if kind not in KINDS:
        raise InputError(f"{shown(kind)} is not a mixer{allowed_values(kind, [*KINDS, 'window'])}", _WHERE)
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        allowed = sorted(MIXERS[kind].__struct_fields__)
        if not equals:
            example = f"p={part.strip()}" if kind == "power" and part.strip().isdigit() else _example(kind)
            raise InputError(f"{shown(part)} is not a setting; write key=value, such as {example}", _WHERE)
        if key not in allowed:
            raise InputError(
                f"{shown(key)} is not a setting of {kind}{allowed_values(key, allowed)}",
                _WHERE,
            )
        if key in settings:
            raise InputError(f"{key} is set twice", _WHERE)
        settings[key] = parse_context(value, f"{_WHERE} {key}") if key in LENGTHS else _value(value.strip())
    if kind == "power" and "p" not in settings:
        raise InputError("power needs its degree; write power:p=2", _WHERE)
    return kind, settings


def _example(kind: str) -> str:
    return "p=2" if kind == "power" else "heads=8"


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,4000}", text) else text


def _shape(
    mixer: Mixer, kind: str, hidden: int, known: Mixer | None, heads_set: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields that a mixer of `kind` takes in the place of `mixer`, and remarks on what changes besides.

    known: what `first_of` has. heads_set: the settings give heads and head_dim.
    """
    target = MIXERS[kind]
    keeps_window = kind not in ("attention", "forgetting")
    kept = [field for field in target.__struct_fields__ if keeps_window or field not in _ASKED]
    if type(mixer) is target:
        return {field: getattr(mixer, field) for field in kept}, []
    # Heads are the layer's own, so that its weights stay; what else there is to a kind, a model has once.
    once = {field: getattr(known, field) for field in kept if field in _fields(known) - _fields(GroupedHeads)}
    if isinstance(mixer, GroupedHeads) and kind in HEADED:
        fields, remarks = _same_heads(mixer, kind)
        return fields | once, remarks
    if type(known) is target:
        return {field: getattr(known, field) for field in kept}, []
    if isinstance(mixer, MLA) and issubclass(target, MLA):
        return _same_latent(mixer, kind)
    if kind in _FROM_HIDDEN:
        fields, remark = _FROM_HIDDEN[kind](hidden)
        return fields, [remark]
    if heads_set:
        return once, [f"{kind} with other heads: the weights change too"]
    heads, remarks = _heads(mixer, kind, hidden)
    if not issubclass(target, MLA):
        return {field: value for field, value in (heads | once).items() if field in target.__struct_fields__}, remarks
    latent = _LATENT | {"qk_nope_head_dim": heads["head_dim"], "v_head_dim": heads["v_head_dim"]}
    return {"heads": heads["heads"], **latent} | (_QUERY_LATENT if kind == "dsa" else {}), [
        f"{kind} with DeepSeek-V3's latents and a RoPE key of 64: the weights change too"
    ]


def _fields(mixer: Mixer | type[Mixer] | None) -> set[str]:
    return set() if mixer is None else set(mixer.__struct_fields__)


def _same_heads(mixer: GroupedHeads, kind: str) -> tuple[dict[str, Any], list[str]]:
    """All that both have, but for the window and the degree, which are the question."""
    kept = [field for field in mixer.__struct_fields__ if field in MIXERS[kind].__struct_fields__]
    lost = [field for field in ("gated", "sinks") if field not in kept and getattr(mixer, field, False)]
    fields = {field: getattr(mixer, field) for field in kept if field not in _ASKED}
    return fields, [f"{field} is left out, {kind} has none" for field in lost]


def _same_latent(mixer: MLA, kind: str) -> tuple[dict[str, Any], list[str]]:
    fields = {field: getattr(mixer, field) for field in MLA.__struct_fields__}
    if kind != "dsa":
        return fields, ["the indexer is left out, mla has none"]
    if mixer.q_lora_rank is not None:
        return fields, []
    return fields | _QUERY_LATENT, ["the indexer needs a query latent: 1,536 as in DeepSeek-V3"]


def _heads(mixer: Mixer, kind: str, hidden: int) -> tuple[dict[str, int], list[str]]:
    """Return query heads and head dims in the sense of attention, and what that changes."""
    if isinstance(mixer, MLA):
        heads = {"head_dim": mixer.qk_nope_head_dim + mixer.qk_rope_head_dim, "v_head_dim": mixer.v_head_dim}
        remark = "MLA's low-rank projections become full ones of the same heads: the weights change too"
        bias = {"bias": mixer.bias} if kind in HEADED else {}
        return {"heads": mixer.heads, **heads, **bias}, [remark]
    if isinstance(mixer, (GroupedHeads, MatrixState, RWKV7)):
        heads = {field: getattr(mixer, field) for field in ("heads", "head_dim", "v_head_dim")}
        return heads, [f"{kind} has projections of its own for the same heads: the weights change too"]
    if hidden % 64:
        raise InputError(f"{mixer.describe()} has no heads to take over; write heads and head_dim", _WHERE)
    heads = {"heads": hidden // 64, "head_dim": 64, "v_head_dim": 64}
    return heads, [f"{mixer.describe()} has no heads to take over: heads of 64 are assumed, the weights change too"]


_LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
_QUERY_LATENT: dict[str, Any] = {"q_lora_rank": 1536}


def _rwkv7(hidden: int) -> tuple[dict[str, Any], str]:
    """Ranks as flash-linear-attention derives them from the width (layers/rwkv7.py)."""

    def rank(factor: float) -> int:
        return max(32, round(factor * math.sqrt(hidden) / 32) * 32)

    fields = {"heads": max(1, hidden // 64), "decay_rank": rank(2.5), "rate_rank": rank(2.5), "gate_rank": rank(5)}
    return fields | {
        "value_rank": rank(1.7),
        "channel_mix": False,
    }, "rwkv7 with heads of 64 and the usual ranks: the weights change too"


def _mamba1(hidden: int) -> tuple[dict[str, Any], str]:
    fields = {"inner_size": 2 * hidden, "dt_rank": -(-hidden // 16)}
    return fields, "mamba1 with twice the width inside and a state of 16: the weights change too"


def _mamba2(hidden: int) -> tuple[dict[str, Any], str]:
    fields = {"heads": max(1, hidden // 32)}
    return fields, "twice the width inside in heads of 64, and a state of 128, as Mamba-2 has: the weights change too"


_FROM_HIDDEN = {"rwkv7": _rwkv7, "mamba1": _mamba1, "mamba2": _mamba2, "log_linear": _mamba2}
"""Kinds whose fields follow from the model's width, not from the heads it had."""
