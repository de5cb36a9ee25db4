"""Read a Hugging Face config.json as a ModelSpec. No code of the model's folder runs; transformers is not needed.

The readers return the configuration that takes effect. The defaults of a family are those of its config class in
transformers 5. A window counts only where the family's code applies it. A key that would change the count and is not
understood is refused by name. Sizes that every published file states (width, layers, heads, vocabulary) have no
default, and a file without them is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from powerplan.documents import Document
from powerplan.errors import InputError, allowed_values, shown
from powerplan.huggingface import dense, experts, fla, hybrids, mamba
from powerplan.huggingface.config import Config
from powerplan.spec import ModelSpec

Reader = Callable[[Config, str], ModelSpec]
"""Takes a config and a name for the model. Raises InputError for what it does not understand."""

FAMILIES: dict[str, Reader] = {
    "deepseek_v2": experts.deepseek_v2,
    "deepseek_v3": experts.deepseek_v3,
    "deepseek_v32": experts.deepseek_v32,
    "gemma2": dense.gemma2,
    "gemma3_text": dense.gemma3,
    "gpt2": dense.gpt2,
    "gpt_oss": experts.gpt_oss,
    "jamba": mamba.jamba,
    "kimi_k2": experts.deepseek_v3,
    "kimi_linear": hybrids.kimi_linear,
    "llama": dense.llama,
    "mamba": mamba.mamba,
    "mamba2": mamba.mamba2,
    "minimax": hybrids.minimax,
    "minimax_m1": hybrids.minimax,
    "minimax_text_01": hybrids.minimax,
    "mistral": dense.mistral,
    "mixtral": experts.mixtral,
    "nemotron_h": mamba.nemotron_h,
    "olmo2": dense.olmo2,
    "powercoder": dense.powercoder,
    "qwen2": dense.qwen2,
    "qwen3": dense.qwen3,
    "qwen3_moe": experts.qwen3_moe,
    "qwen3_next": hybrids.qwen3_next,
    "starcoder2": dense.starcoder2,
    **fla.FAMILIES,
}
"""The reader of each model_type. Wrappers (gemma3, mistral3 ...) are read through their text_config."""

ORIGINAL_MAMBA = "mamba_ssm"
"""The family of state-spaces/mamba's own files, which have d_model and n_layer, and no model_type."""

NESTED_DEFAULTS = {"gemma3": "gemma3_text", "kimi_k25": "kimi_k2"}
"""The model_type of the text_config in wrappers whose files leave it out there."""


def supported_families() -> list[str]:
    """Return the model_type values that are read, wrappers included."""
    return sorted({*FAMILIES, *NESTED_DEFAULTS})


def read_config(document: Document, fallback_name: str) -> tuple[ModelSpec, tuple[str, ...]]:
    """Read a config.json.

    Args:
        document: The parsed file.
        fallback_name: The model's name where the file does not state one.

    Returns:
        The spec, and remarks that a user should see.

    Raises:
        InputError: The family is unknown, a value is missing or contradicts another, or a setting would change the
            count and is not understood. The message begins with file:line:column.
    """
    if not isinstance(document.data, dict):
        raise InputError("a config.json is an object, and this is not one", document.where())
    config, family = _text_config(document)
    name = _name(document, fallback_name)
    try:
        reader = mamba.mamba_ssm if family == ORIGINAL_MAMBA else FAMILIES[family]
        spec = reader(config, name)
    except InputError as error:
        if error.where is None:
            raise config.error(error.problem) from None
        raise
    _note_other_heads(document, config)
    if config.has("quantization_config"):
        config.note("quantization_config is not read: bytes follow --dtype")
    if config.has("power_degree"):
        config.note(f"power_degree is not read: ask with --mixer power:p={shown(config.data['power_degree'])}")
    return spec, tuple(config.notes)


def _text_config(document: Document) -> tuple[Config, str]:
    outer = Config(document)
    family = outer.data.get("model_type")
    if family is None and outer.has("d_model") and outer.has("n_layer"):
        return outer, ORIGINAL_MAMBA
    if family is None:
        raise outer.error("has no model_type, so its family is unknown; a powerplan spec is YAML, with a .yaml suffix")
    if not isinstance(family, str):
        raise outer.error(f"model_type must be a word, and is {shown(family)}", "model_type")
    if family in FAMILIES:
        return outer, family
    inner = outer.data.get("text_config")
    if isinstance(inner, dict):
        config = Config(document, ("text_config",))
        family_inside = inner.get("model_type", NESTED_DEFAULTS.get(family))
        if isinstance(family_inside, str) and family_inside in FAMILIES:
            config.data = _with_outer_tie(inner, outer) | {"model_type": family_inside}
            config.note(f"{family}: the text decoder alone is counted, other towers and projectors are not")
            return config, family_inside
        raise outer.error(
            f"model_type {shown(family)} with text_config of {shown(family_inside)} is not supported; "
            f"supported are {', '.join(supported_families())}",
            "model_type",
        )
    if inner is not None:
        raise outer.error(f"text_config must be an object, and is {shown(inner)}", "text_config")
    if family in NESTED_DEFAULTS:
        raise outer.error(f"{family} needs text_config, and the file has none", "model_type")
    may_be = allowed_values(family, supported_families(), label="supported")
    raise outer.error(f"model_type {shown(family)} is not supported{may_be}", "model_type")


def _with_outer_tie(inner: dict[str, Any], outer: Config) -> dict[str, Any]:
    """Return the text_config with the wrapper's tie_word_embeddings, which goes first where the wrapper states it."""
    if outer.has("tie_word_embeddings"):
        return inner | {"tie_word_embeddings": outer.boolean("tie_word_embeddings", False)}
    return inner


def _name(document: Document, fallback: str) -> str:
    stated = document.data.get("_name_or_path")
    if isinstance(stated, str):
        last = PurePosixPath(stated.strip().replace("\\", "/")).name
        if last not in ("", ".", "..") and last.isprintable():
            return last[:200]
    return fallback[:200] or "model"


def _note_other_heads(document: Document, config: Config) -> None:
    names = document.data.get("architectures")
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and not name.endswith(causal):
            config.note(f"architectures names {shown(name)}; it is counted as a language model, with its LM head")
