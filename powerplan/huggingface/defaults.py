"""What transformers' config classes supply where a file leaves it out.

defaults.json is made by scripts/transformers_defaults.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import msgspec


class Wrapper(msgspec.Struct, frozen=True):
    """A config class that holds a text decoder in text_config, beside other towers.

    text: the model_type of a text_config that names none. tied: the class's tie_word_embeddings, None if it has none.
    """

    text: str
    tied: bool | None = None


class ClassDefaults(msgspec.Struct, frozen=True):
    """The defaults of a config class, and its aliases: the name of a key in the code to the name that is stored.

    positions: rope_parameters and max_position_embeddings of a config that says nothing of them.
    """

    defaults: Mapping[str, Any] = {}
    aliases: Mapping[str, str] = {}
    positions: Mapping[str, Any] = {}


class _File(msgspec.Struct, frozen=True):
    transformers: str
    families: dict[str, ClassDefaults]
    wrappers: dict[str, Wrapper]


class Tables(NamedTuple):
    """What defaults.json holds, by model_type: the defaults of families, and the wrappers of text decoders."""

    families: Mapping[str, ClassDefaults]
    wrappers: Mapping[str, Wrapper]


@cache
def tables() -> Tables:
    """Return the defaults of each model_type of transformers, and its wrappers."""
    text = (files("powerplan.huggingface") / "defaults.json").read_bytes()
    read = msgspec.json.decode(text, type=_File)
    return Tables(read.families, read.wrappers | WRAPPERS)


WRAPPERS = {
    "emu3": Wrapper(text="emu3_text_model", tied=False),
    "kimi_k25": Wrapper(text="kimi_k2"),
    "kimi_k3": Wrapper(text="kimi_linear"),
}
"""Wrappers that transformers does not have, or whose text decoder has another reader here."""

FLAT_WRAPPERS = {
    "fuyu": frozenset({"image_size", "num_channels", "patch_size"}),
    "qwen2_5_vl": frozenset({"vision_config"}),
    "qwen2_vl": frozenset({"vision_config"}),
}
"""Wrappers whose published files have no text_config but its keys at the top, and keys that concern images."""

STATED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
"""Sizes that every published file states: they have no default but in a text_config."""


def class_defaults(model_type: str, *, nested: bool) -> ClassDefaults:
    """Return the defaults of a family; without STATED, under any of their names, unless it is `nested` in a wrapper."""
    known = tables().families.get(model_type, ClassDefaults())
    if nested:
        return known
    stated = {*STATED, *(known.aliases.get(name, name) for name in STATED)}
    defaults = {name: value for name, value in known.defaults.items() if name not in stated}
    return ClassDefaults(defaults, known.aliases, known.positions)
