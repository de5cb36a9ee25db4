"""The shorthand of a spec's file, written out: sizes such as "4k", and what may be left out as the model says it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from powerplan.errors import InputError
from powerplan.mixers import SIZED
from powerplan.spec import LENGTHS
from powerplan.units import parse_context


def with_defaults(data: Any) -> Any:
    """Return the data of a spec with its shorthand written out: sizes such as "4k" and head dims that are left out.

    A missing head_dim becomes hidden_size / heads if that is whole and the kind needs one (SIZED), and a missing
    vocab_size of a table the model's. What is wrong in the data stays as it is, for the validation to report.
    """
    if not isinstance(data, dict):
        return data
    data = _with_length(data, "trained_context")
    if "rope" in data:
        rope = data["rope"]
        written = [_scaling_written_out(item) for item in rope] if _is_list(rope) else _scaling_written_out(rope)
        data |= {"rope": written}
    if not _is_list(data.get("layers")):
        return data
    return data | {"layers": [_written_out(group, data) for group in data["layers"]]}


def _written_out(group: Any, model: dict[str, Any]) -> Any:
    if not isinstance(group, dict):
        return group
    if _is_list(group.get("pattern")):
        group = group | {"pattern": [_written_out(layer, model) for layer in group["pattern"]]}
    mixer, ffn, hidden = group.get("mixer"), group.get("ffn"), model.get("hidden_size")
    if isinstance(ffn, dict) and ffn.get("kind") == "stem" and "vocab_size" in model:
        group = group | {"ffn": {"vocab_size": model["vocab_size"]} | ffn}
    if not isinstance(mixer, dict):
        return group
    for key in LENGTHS:
        mixer = _with_length(mixer, key)
    heads, kind = mixer.get("heads"), mixer.get("kind")
    lacks_head_dim = isinstance(kind, str) and kind in SIZED and "head_dim" not in mixer
    are_counts = all(type(count) is int and count > 0 for count in (heads, hidden))
    if lacks_head_dim and are_counts and hidden % heads == 0:
        mixer = mixer | {"head_dim": hidden // heads}
    return group | {"mixer": mixer}


def _scaling_written_out(rope: Any) -> Any:
    if not isinstance(rope, dict) or not isinstance(rope.get("scaling"), dict):
        return rope
    return rope | {"scaling": _with_length(rope["scaling"], "original_context")}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _with_length(data: dict[str, Any], key: str) -> dict[str, Any]:
    if isinstance(data.get(key), str):
        with suppress(InputError):
            return data | {key: parse_context(data[key])}
    return data
