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
    """A config class that holds a text decoder, beside other towers.

    text: the model_type of a decoder's config that names none; empty where it must name one. tied: the class's
    tie_word_embeddings, None if it has none. either: whether embeddings are tied where the decoder's config says so and
    the one around it says no. path: where the decoder's config is; older: where files have it that lack that. alone:
    whether the decoder's config alone says if embeddings are tied, as in code outside transformers.
    """

    text: str
    tied: bool | None = None
    either: bool = False
    path: tuple[str, ...] = ("text_config",)
    older: tuple[str, ...] = ()
    alone: bool = False

    def of(self, data: Any) -> Wrapper:
        """Return the wrapper with the path that a file has."""
        older = msgspec.structs.replace(self, path=self.older, older=())
        return older if self.older and self.within(data) is None and older.within(data) is not None else self

    def within(self, data: Any) -> Any:
        """Return the decoder's config in a file; None where it has none."""
        for step in self.path:
            data = data.get(step) if isinstance(data, Mapping) else None
        return data


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


_IN_LLM = Wrapper(text="", path=("llm_config",), alone=True)
_IN_LANGUAGE = Wrapper(text="", path=("language_config",), alone=True)
_IN_THINKER = ("thinker_config", "text_config")

WRAPPERS = {
    "NVLM_D": _IN_LLM,
    "NemotronH_Nano_VL_V2": _IN_LLM,
    "deepseek_vl_v2": Wrapper(text="deepseek_v2", path=("language_config",), alone=True),
    "emu3": Wrapper(text="emu3_text_model", tied=False),
    "h2ovl_chat": _IN_LLM,
    "internvl_chat": _IN_LLM,
    "interns1": Wrapper(text=""),
    "kimi_k25": Wrapper(text="kimi_k2"),
    "kimi_k3": Wrapper(text="kimi_linear"),
    "kimi_vl": Wrapper(text="deepseek_v3"),
    "llava_onevision1_5": Wrapper(text="qwen3"),
    "minimax_vl_01": Wrapper(text="minimax_text_01"),
    "multi_modality": _IN_LANGUAGE,
    "ovis": _IN_LLM,
    "ovis2_5": _IN_LLM,
    "qwen2_5_omni": Wrapper(text="qwen2_5_omni_text", tied=False, path=_IN_THINKER),
    "qwen3_omni_moe": Wrapper(text="qwen3_omni_moe_text", tied=False, path=_IN_THINKER),
    "skywork_chat": _IN_LLM,
    "ultravox": Wrapper(text=""),
    "vibevoice": Wrapper(text="qwen2", older=("decoder_config",), alone=True),
}
"""Wrappers that transformers does not have, whose text decoder has another reader here, or is not in text_config.

VibeVoice is in transformers, where its class follows the text_config alone; Microsoft's files have a decoder_config.
"""

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
