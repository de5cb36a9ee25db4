"""`--mixer`: the same model with another sequence mixer in every layer."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from powerplan.errors import InputError, choice, did_you_mean, shown
from powerplan.mixers import HEADED, MIXERS, MLA, AnyMixer, GroupedHeads, Mixer
from powerplan.spec import LENGTHS, MAX_NAME, ModelSpec
from powerplan.units import parse_context
from powerplan.validation import plain_problem, words_of

KINDS = sorted(HEADED)

_WORDS = {"true": True, "false": False}
_WHERE = "--mixer"


def with_mixer(spec: ModelSpec, text: str) -> tuple[ModelSpec, list[str]]:
    """Return `spec` with the mixer that `text` describes in every layer, and remarks on what was assumed.

    `text` is a kind with settings: attention, window:4096, power:p=2, power:p=2,gated=true, linear. Heads, head
    dims, biases and qk-norm stay as they are; MLA's heads become ordinary ones of the same dimensions, which changes
    the weights. Raises InputError for an unknown kind or setting.
    """
    kind, settings = parse_mixer(text)
    notes: list[str] = []

    def change(mixer: Mixer) -> AnyMixer:
        changed, remarks = swapped(mixer, kind, settings)
        notes.extend(remark for remark in remarks if remark not in notes)
        return changed

    return renamed(spec.map_mixers(change), spec.name, text), notes


def swapped(mixer: Mixer, kind: str, settings: dict[str, Any]) -> tuple[AnyMixer, list[str]]:
    """Return the mixer of `kind` that takes over from `mixer` what is not set, and remarks on what was assumed."""
    shape, remarks = _shape(mixer, kind)
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
        hint = did_you_mean(kind, [*KINDS, "window"])
        raise InputError(
            f"{shown(kind)} is not a mixer{hint}; write attention, window:4096, power:p=2 or linear", _WHERE
        )
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        allowed = sorted(MIXERS[kind].__struct_fields__)
        if not equals:
            example = f"p={part.strip()}" if kind == "power" and part.strip().isdigit() else "p=2"
            raise InputError(f"{shown(part)} is not a setting; write key=value, such as {example}", _WHERE)
        if key not in allowed:
            raise InputError(
                f"{shown(key)} is not a setting of {kind}{choice(key, allowed)}",
                _WHERE,
            )
        if key in settings:
            raise InputError(f"{key} is set twice", _WHERE)
        settings[key] = parse_context(value, f"{_WHERE} {key}") if key in LENGTHS else _value(value.strip())
    if kind == "power" and "p" not in settings:
        raise InputError("power needs its degree; write power:p=2", _WHERE)
    return kind, settings


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,4000}", text) else text


def _shape(mixer: Mixer, kind: str) -> tuple[dict[str, Any], list[str]]:
    """Return the fields that a mixer of `kind` takes over from `mixer`, and what is lost on the way.

    All that both have, but for the window and the degree, which are the question.
    """
    if isinstance(mixer, GroupedHeads):
        fields = [field for field in mixer.__struct_fields__ if field not in ("window", "p")]
        kept = [field for field in fields if field in MIXERS[kind].__struct_fields__]
        lost = [field for field in ("gated", "sinks") if field not in kept and getattr(mixer, field, False)]
        return {field: getattr(mixer, field) for field in kept}, [
            f"{field} is left out, {kind} has none" for field in lost
        ]
    if isinstance(mixer, MLA):
        shape = {
            "heads": mixer.heads,
            "head_dim": mixer.qk_nope_head_dim + mixer.qk_rope_head_dim,
            "v_head_dim": mixer.v_head_dim,
            "bias": mixer.bias,
        }
        return shape, ["MLA's low-rank projections become full ones of the same heads: the weights change too"]
    raise InputError(f"a model with {mixer.describe()} layers cannot take another mixer's heads", _WHERE)
