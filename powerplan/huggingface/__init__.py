"""Read a Hugging Face config.json as a ModelSpec. No code of the model's folder runs; transformers is not needed.

The readers return the configuration that takes effect. The defaults of a family are those of its config class in
transformers 5. A window counts only where the family's code applies it. Sizes that every published file states (width,
layers, heads, vocabulary) have no default, and a file without them is refused.

No key is ignored silently. What no reader looked up must change no count (inert.py), or say no (null, false, 0), or be
the default of its family. A number or a word beside these gets a note; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from powerplan.documents import Document
from powerplan.errors import InputError, did_you_mean, parameter, shown
from powerplan.huggingface.audit import audit, nearest_family
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.defaults import STATED, Wrapper, class_defaults, tables
from powerplan.huggingface.families import FAMILIES, REFUSED, supported_families, wrapped_families
from powerplan.huggingface.flat import FLAT, flat_family
from powerplan.huggingface.mamba import mamba_ssm
from powerplan.huggingface.mistral_native import FAMILY as MISTRAL_FAMILY
from powerplan.huggingface.mistral_native import NAME as MISTRAL_NATIVE
from powerplan.huggingface.mistral_native import is_mistral_native
from powerplan.huggingface.quantization import with_quantization
from powerplan.huggingface.rope import with_rope
from powerplan.spec import ModelSpec

__all__ = ["FAMILIES", "REFUSED", "read_config", "supported_families"]


def read_config(document: Document, fallback_name: str, like: str | None = None) -> tuple[ModelSpec, tuple[str, ...]]:
    """Return the spec of a config.json, and remarks that a user should see.

    Args:
        document: The file.
        fallback_name: The model's name where the file has none.
        like: A family, by its model_type, whose reader reads the file whatever its own model_type is.

    Raises:
        InputError: The family is unknown, a value is missing or contradicts another, or a setting would change the
            count and is not understood. The message begins with file:line:column.
    """
    if not isinstance(document.data, dict):
        raise InputError("a config.json is an object, and this is not one", document.where())
    config, family = _text_config(document) if like is None else _read_like(document, like)
    known = class_defaults(family.like or config.family, nested=bool(config.prefix))
    config.complete({**known.defaults, **family.defaults}, {**known.aliases, **family.aliases})
    try:
        for key in ("add_cross_attention", "is_encoder_decoder"):
            config.refuse(key, "powerplan plans decoders without cross-attention")
        spec = with_rope(family.read(config, _name(document, fallback_name)), config, family)
    except InputError as error:
        if error.where is None:
            raise config.error(error.problem) from None
        raise
    _note_power_attention(config)
    audit(config, family, refuse=like is None)
    _note_other_heads(document, config)
    spec = with_quantization(spec, config)
    return spec, tuple(config.notes)


def _text_config(document: Document) -> tuple[Config, Family]:
    """Return the config of the text decoder and its family; the original Mamba's files have no model_type."""
    outer = Config(document)
    family = outer.data.get("model_type")
    if family is None and outer.has("d_model") and outer.has("n_layer"):
        return outer, Family(mamba_ssm, defaults={"ngroups": 1})
    if family is None and is_mistral_native(document.data):
        return Config(document, changes={"model_type": MISTRAL_NATIVE}), MISTRAL_FAMILY
    if family is None:
        raise outer.error("has no model_type, so its family is unknown; a powerplan spec is YAML, with a .yaml suffix")
    if not isinstance(family, str):
        raise outer.error(f"model_type must be a word, and is {shown(family)}", "model_type")
    if family == "git" and outer.data.get("architectures") == ["Grok1ForCausalLM"]:  # Grok 2's file.
        return Config(document, changes={"model_type": "grok-1"}), FAMILIES["grok-1"]
    wrapper = tables().wrappers.get(family, Wrapper(text="")).of(outer.data)
    inner, name = wrapper.within(outer.data), ".".join(wrapper.path)
    if inner is not None and not isinstance(inner, dict):
        raise outer.error(f"{name} must be an object, and is {shown(inner)}", *wrapper.path)
    if family in FAMILIES:
        return outer, FAMILIES[family]
    if family in REFUSED:
        raise outer.error(f"model_type {shown(family)} is not supported: {REFUSED[family]}", "model_type")
    if family in tables().wrappers and inner is not None:
        return _wrapped(document, outer, family, wrapper)
    if family in FLAT and inner is None:
        return _flat(document, outer, family)
    if family in wrapped_families():
        raise outer.error(f"{family} needs {name}, and the file has none", "model_type")
    if inner is not None:
        problem = f"model_type {shown(family)} is not supported, a wrapper whose text_config may mean something else"
        raise outer.error(f"{problem}{_nearest(inner)}", "model_type")
    hint = did_you_mean(family, supported_families(), cutoff=NEAR_SPELLING) or _nearest(document.data) + ";"
    raise outer.error(f"model_type {shown(family)} is not supported{hint} {LISTED}", "model_type")


LISTED = "powerplan models --families lists what is"
NEAR_SPELLING = 0.75
"""How alike a model_type must be to one that is meant: of so many, most words are a little like one."""


def _nearest(data: dict[str, Any]) -> str:
    family = nearest_family(data)
    return f"; its keys are most like those of {family}: --like {family} reads it so" if family else ""


def _read_like(document: Document, like: str) -> tuple[Config, Family]:
    """Return the config, or the text decoder's in it, to be read as the family `like`."""
    if like not in FAMILIES:
        hint = did_you_mean(like, FAMILIES) or ";"
        raise InputError(f"{shown(like)} is not a family that is read{hint} {LISTED}", parameter("like"))
    wrapper = tables().wrappers.get(str(document.data.get("model_type")), Wrapper(text="")).of(document.data)
    inner = isinstance(wrapper.within(document.data), dict)
    config = Config(document, wrapper.path if inner else (), {"model_type": like})
    config.note(f"read like {like}, as --like says")
    return config, FAMILIES[like]


def _wrapped(document: Document, outer: Config, family: str, wrapper: Wrapper) -> tuple[Config, Family]:
    """Return the text decoder within a wrapper."""
    inner, place = wrapper.within(document.data), ".".join(wrapper.path)
    text = inner.get("model_type") or wrapper.text
    if not text:
        raise outer.error(f"{place} needs model_type, and the file has none", *wrapper.path)
    if not isinstance(text, str) or text not in FAMILIES:
        problem = f"model_type {shown(family)} with {place} of {shown(text)} is not supported"
        raise outer.error(f"{problem}; {LISTED}", "model_type")
    known = class_defaults(FAMILIES[text].like or text, nested=True)
    changes: dict[str, Any] = {"model_type": text}
    config = Config(document, wrapper.path, changes)
    config.note(f"{family}: the text decoder alone is counted, other towers and projectors are not")
    tied = _tied(config, outer if len(wrapper.path) == 1 else outer.part(*wrapper.path[:-1]), wrapper, known.defaults)
    if tied is not None:
        config = Config(document, wrapper.path, changes | {"tie_word_embeddings": tied}, config.notes)
    left_out = [name for name in STATED if name not in inner and known.aliases.get(name, name) not in inner]
    if left_out:
        sizes = {name: known.defaults.get(known.aliases.get(name, name)) for name in left_out}
        texts = [f"{name} {size:,}" for name, size in sizes.items() if isinstance(size, int)]
        if texts:
            config.note(f"{place} leaves out sizes, which are transformers' defaults of {text}: {', '.join(texts)}")
    return config, FAMILIES[text]


def _tied(text: Config, around: Config, wrapper: Wrapper, defaults: Mapping[str, Any]) -> bool | None:
    """Return whether a wrapper ties its decoder's embeddings, None where the decoder's own config alone says it.

    What is stated around the decoder's config holds, but for the classes that tie where either says so. Where nothing
    is, transformers 5 follows the wrapper's class and older versions the decoder's config: embeddings are tied where
    both say so, and in older files where the decoder's config states it. Code outside transformers knows the decoder's
    config alone.
    """
    if wrapper.alone:
        return None
    key = "tie_word_embeddings"
    inside = text.boolean(key, False) if text.has(key) else None
    within = bool(defaults.get(key, wrapper.tied)) if inside is None else inside  # Some decoders' classes have none.
    if around.has(key):
        stated = around.boolean(key, False)
        tied = stated or (wrapper.either and within)
        if inside is not None and inside != stated:
            said = f"{key} is {str(stated).lower()} in the file and {str(inside).lower()} in its text_config"
            text.note(f"{said}; the {'first' if tied == stated else 'second'} holds, as in transformers")
        return tied
    version = around.document.data.get("transformers_version")
    by_class = wrapper.tied is not False or (wrapper.either and within)
    if inside and not by_class and isinstance(version, str) and version.startswith("5"):
        text.note(f"{key} of the text_config is not heeded: transformers 5, which wrote the file, follows its class")
        return False
    return within and (by_class or bool(inside))


def _flat(document: Document, outer: Config, family: str) -> tuple[Config, Family]:
    """Return the text decoder of a wrapper whose files have its keys beside those of the other towers."""
    text, inert = flat_family(outer, family)
    config = Config(document, changes={"model_type": text})
    config.note(f"{family}: the text decoder alone is counted, other towers and projectors are not")
    return config, replace(FAMILIES[text], inert=FAMILIES[text].inert | inert)


def _name(document: Document, fallback: str) -> str:
    stated = document.data.get("_name_or_path")
    if isinstance(stated, str):
        last = PurePosixPath(stated.strip().replace("\\", "/")).name
        if last not in ("", ".", "..") and last.isprintable():
            return last[:200]
    return fallback[:200] or "model"


def _note_power_attention(config: Config) -> None:
    """Say how to count power attention, whose keys `powerplan.models.power_class` adds to a config."""
    if not config.has("power_degree"):
        return
    gated, layers, _, _ = (config.data.get(f"power_{key}") for key in ("gated", "layers", "chunk_size", "softmax"))
    mixer = f"power:p={shown(config.data['power_degree'])}{',gated=true' if gated else ''}"
    everywhere = ", which puts it into all layers, not into power_layers alone" if layers else ""
    config.note(f"power_degree is not read: ask with --mixer {mixer}{everywhere}")


def _note_other_heads(document: Document, config: Config) -> None:
    names = document.data.get("architectures")
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and not name.endswith(causal):
            config.note(f"architectures names {shown(name)}; it is counted as a language model, with its LM head")
