"""Read a Hugging Face config.json as a ModelSpec. No code of the model's folder runs; transformers is not needed.

The readers return the configuration that takes effect. The defaults of a family are those of its config class in
transformers 5. A window counts only where the family's code applies it. A key that would change the count and is not
understood is refused by name. Sizes that every published file states (width, layers, heads, vocabulary) have no
default, and a file without them is refused.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from powerplan.documents import Document
from powerplan.errors import InputError, allowed_values, shown
from powerplan.huggingface import dense, experts, fla, hybrids, mamba
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.quantization import with_quantization
from powerplan.spec import ModelSpec

_DEEPSEEK_V3 = {
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
}
_GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_MIXTRAL = {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(
        experts.deepseek_v2,
        first_k_dense_replace=0,
        moe_intermediate_size=1407,
        n_routed_experts=64,
        n_shared_experts=2,
        q_lora_rank=1536,
    ),
    "deepseek_v3": Family(experts.deepseek_v3, **_DEEPSEEK_V3),
    "deepseek_v32": Family(experts.deepseek_v32, **_DEEPSEEK_V3),
    "gemma2": Family(dense.gemma2, **_GEMMA),
    "gemma3_text": Family(dense.gemma3, **_GEMMA),
    "gpt2": Family(dense.gpt2),
    "gpt_oss": Family(
        experts.gpt_oss, num_experts_per_tok=4, num_key_value_heads=8, num_local_experts=128, sliding_window=128
    ),
    "jamba": Family(mamba.jamba, num_key_value_heads=8, num_experts=16, num_experts_per_tok=2),
    "kimi_k2": Family(experts.deepseek_v3, **_DEEPSEEK_V3),
    "kimi_linear": Family(
        hybrids.kimi_linear,
        first_k_dense_replace=1,
        moe_intermediate_size=1024,
        num_experts=256,
        num_experts_per_tok=8,
        num_shared_experts=1,
    ),
    "llama": Family(dense.llama),
    "mamba": Family(mamba.mamba),
    "mamba2": Family(mamba.mamba2, n_groups=8),
    "minimax": Family(hybrids.minimax, **_MIXTRAL),
    "minimax_m1": Family(hybrids.minimax, **_MIXTRAL),
    "minimax_text_01": Family(hybrids.minimax, **_MIXTRAL),
    "mistral": Family(dense.mistral, num_key_value_heads=8, sliding_window=4096),
    "mixtral": Family(experts.mixtral, **_MIXTRAL),
    "nemotron_h": Family(
        mamba.nemotron_h, head_dim=128, n_groups=8, n_routed_experts=8, num_experts_per_tok=2, num_key_value_heads=8
    ),
    "olmo2": Family(dense.olmo2),
    "powercoder": Family(dense.powercoder, num_key_value_heads=2),
    "qwen2": Family(dense.qwen2, **_QWEN),
    "qwen3": Family(dense.qwen3, head_dim=128, **_QWEN),
    "qwen3_moe": Family(
        experts.qwen3_moe,
        max_window_layers=0,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_key_value_heads=4,
        sliding_window=4096,
    ),
    "qwen3_next": Family(
        hybrids.qwen3_next,
        head_dim=256,
        moe_intermediate_size=512,
        num_experts=512,
        num_experts_per_tok=10,
        num_key_value_heads=2,
        shared_expert_intermediate_size=512,
    ),
    "starcoder2": Family(dense.starcoder2, num_key_value_heads=2),
    **fla.FAMILIES,
}
"""The reader of each model_type, and its defaults. Wrappers (mistral3 ...) are read through their text_config."""

NESTED_DEFAULTS = {"gemma3": "gemma3_text", "kimi_k25": "kimi_k2"}
"""The model_type of the text_config in wrappers whose files leave it out there."""


def supported_families() -> list[str]:
    """Return the model_type values that are read, wrappers included."""
    return sorted({*FAMILIES, *NESTED_DEFAULTS})


def read_config(document: Document, fallback_name: str) -> tuple[ModelSpec, tuple[str, ...]]:
    """Return the spec of a config.json, and remarks that a user should see; `fallback_name` where the file has no name.

    InputError, whose message begins with file:line:column, where the family is unknown, a value is missing or
    contradicts another, or a setting would change the count and is not understood.
    """
    if not isinstance(document.data, dict):
        raise InputError("a config.json is an object, and this is not one", document.where())
    config, family = _text_config(document)
    config.defaults = family.defaults
    try:
        spec = family.read(config, _name(document, fallback_name))
    except InputError as error:
        if error.where is None:
            raise config.error(error.problem) from None
        raise
    _note_other_heads(document, config)
    spec = with_quantization(spec, config)
    if config.has("power_degree"):
        config.note(f"power_degree is not read: ask with --mixer power:p={shown(config.data['power_degree'])}")
    return spec, tuple(config.notes)


def _text_config(document: Document) -> tuple[Config, Family]:
    """Return the config of the text decoder and its family; the original Mamba's files have no model_type."""
    outer = Config(document)
    family = outer.data.get("model_type")
    if family is None and outer.has("d_model") and outer.has("n_layer"):
        return outer, Family(mamba.mamba_ssm, ngroups=1)
    if family is None:
        raise outer.error("has no model_type, so its family is unknown; a powerplan spec is YAML, with a .yaml suffix")
    if not isinstance(family, str):
        raise outer.error(f"model_type must be a word, and is {shown(family)}", "model_type")
    if family in FAMILIES:
        return outer, FAMILIES[family]
    inner = outer.data.get("text_config")
    if isinstance(inner, dict):
        config = Config(document, ("text_config",))
        family_inside = inner.get("model_type", NESTED_DEFAULTS.get(family))
        if isinstance(family_inside, str) and family_inside in FAMILIES:
            config.data = inner | {"model_type": family_inside}
            if outer.has("tie_word_embeddings"):
                config.data |= {"tie_word_embeddings": outer.boolean("tie_word_embeddings", False)}
            config.note(f"{family}: the text decoder alone is counted, other towers and projectors are not")
            return config, FAMILIES[family_inside]
        problem = f"model_type {shown(family)} with text_config of {shown(family_inside)} is not supported"
        raise outer.error(f"{problem}; supported are {', '.join(supported_families())}", "model_type")
    if inner is not None:
        raise outer.error(f"text_config must be an object, and is {shown(inner)}", "text_config")
    if family in NESTED_DEFAULTS:
        raise outer.error(f"{family} needs text_config, and the file has none", "model_type")
    may_be = allowed_values(family, supported_families(), label="supported")
    raise outer.error(f"model_type {shown(family)} is not supported{may_be}", "model_type")


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
