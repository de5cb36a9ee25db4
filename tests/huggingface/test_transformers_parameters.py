"""Parameter counts and windows against transformers' own models: what a config.json says is what its code builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hf_meta import on_meta

from powerplan.accounting import Accounting
from powerplan.huggingface import supported_families
from powerplan.load import LoadedModel
from powerplan.mixers import Attention
from powerplan.spec import ModelSpec

pytestmark = pytest.mark.transformers

Settings = dict[str, Any]
Read = Callable[[Settings], LoadedModel]


@dataclass(frozen=True)
class Family:
    """A transformers config class, settings that all cases share, and cases: what each sets besides."""

    config_class: str
    base: Settings
    cases: dict[str, Settings]


SMALL: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
MLA = SMALL | {
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
DEEPSEEK: dict[str, Settings] = {
    "first layer dense": {},
    "no dense layer": {"first_k_dense_replace": 0},
    "all dense": {"first_k_dense_replace": 3},
    "more dense than layers": {"first_k_dense_replace": 9},
    "no query latent": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "biases, no query latent": {"attention_bias": True, "q_lora_rank": None},
    "one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_shared_experts": 1},
    "no shared expert": {"n_shared_experts": 0},
    "tied, odd vocabulary": {"tie_word_embeddings": True, "vocab_size": 1009},
    "v wider than k": {"v_head_dim": 31, "qk_nope_head_dim": 3},
}
DEEPSEEK_V3: Settings = {
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
}
DEEPSEEK_V2 = DEEPSEEK_V3 | {
    "vocab_size": 102_400,
    "hidden_size": 5120,
    "intermediate_size": 12_288,
    "num_hidden_layers": 60,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1536,
    "first_k_dense_replace": 1,
}
KIMI_K2 = DEEPSEEK_V3 | {
    "vocab_size": 163_840,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
}
QWEN: dict[str, Settings] = {
    "grouped": {},
    "one kv head": {"num_key_value_heads": 1},
    "kv heads null": {"num_key_value_heads": None},
    "head_dim": {"head_dim": 20},
    "tied": {"tie_word_embeddings": True},
    "windows from layer 2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "windows in every layer": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    "windows after the last layer": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
    "window switched off": {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0},
    "window null": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "layer_types": {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
GEMMA: dict[str, Settings] = {
    "grouped": {},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 6},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True},
    "head_dim of the family": {"head_dim": 256},
    "seven layers": {"num_hidden_layers": 7, "sliding_window": 5},
    "layer_types": {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
}
GEMMA3 = GEMMA | {
    "pattern of 2": {"num_hidden_layers": 5, "sliding_window_pattern": 2},
    "pattern of 1": {"sliding_window_pattern": 1},
    "gemma-3-27b": {
        "vocab_size": 262_208,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
    },
}
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 40},
        {
            "plain": {},
            "n_inner": {"n_inner": 100},
            "untied": {"tie_word_embeddings": False},
            "one layer, one head": {"n_layer": 1, "n_head": 1, "vocab_size": 1, "n_positions": 1},
            "gpt2-xl": {"vocab_size": 50_257, "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024},
        },
    ),
    "llama": Family(
        "LlamaConfig",
        GROUPED,
        {
            "grouped": {},
            "one kv head": {"num_key_value_heads": 1},
            "kv heads null": {"num_key_value_heads": None},
            "head_dim": {"head_dim": 20},
            "attention biases": {"attention_bias": True},
            "mlp biases": {"mlp_bias": True},
            "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            "a window that is not applied": {"sliding_window": 9},
            "llama-3.1-405b": {
                "vocab_size": 128_256,
                "hidden_size": 16_384,
                "intermediate_size": 53_248,
                "num_hidden_layers": 126,
                "num_attention_heads": 128,
                "num_key_value_heads": 8,
            },
        },
    ),
    "mistral": Family(
        "MistralConfig",
        GROUPED,
        {
            "window of the family": {},
            "window null": {"sliding_window": None},
            "window": {"sliding_window": 7},
            "one kv head": {"num_key_value_heads": 1},
            "head_dim": {"head_dim": 20},
            "width that heads do not divide": {"head_dim": 10, "hidden_size": 50},
            "tied": {"tie_word_embeddings": True},
        },
    ),
    "mixtral": Family(
        "MixtralConfig",
        GROUPED,
        {
            "eight experts": {},
            "window": {"sliding_window": 7},
            "few experts": {"num_local_experts": 3, "num_experts_per_tok": 1},
            "all experts chosen": {"num_local_experts": 4, "num_experts_per_tok": 4},
            "head_dim, tied": {"head_dim": 20, "tie_word_embeddings": True},
            "one kv head": {"num_key_value_heads": 1},
        },
    ),
    "qwen2": Family("Qwen2Config", GROUPED, QWEN),
    "qwen3": Family("Qwen3Config", GROUPED, QWEN | {"biases": {"attention_bias": True}}),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        GROUPED | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        {
            "experts in every layer": {},
            "mlp_only_layers": {"mlp_only_layers": [0, 2]},
            "every second layer": {"decoder_sparse_step": 2, "num_hidden_layers": 5},
            "every second layer less one": {"decoder_sparse_step": 2, "num_hidden_layers": 6, "mlp_only_layers": [3]},
            "no experts": {"num_experts": 0},
            "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
            "head_dim, biases": {"head_dim": 20, "attention_bias": True},
            "tied, one kv head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
            "window": {"use_sliding_window": True, "sliding_window": 9},
            "window switched off": {"sliding_window": 9},
            "qwen3-235b-a22b": {
                "vocab_size": 151_936,
                "hidden_size": 4096,
                "intermediate_size": 12_288,
                "num_hidden_layers": 94,
                "num_attention_heads": 64,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 1536,
            },
        },
    ),
    "gemma2": Family("Gemma2Config", GROUPED | {"head_dim": 20}, GEMMA),
    "gemma3_text": Family("Gemma3TextConfig", GROUPED | {"head_dim": 20}, GEMMA3),
    "gemma3": Family("Gemma3Config", GROUPED | {"head_dim": 20}, GEMMA3),
    "olmo2": Family(
        "Olmo2Config",
        GROUPED,
        {
            "grouped": {},
            "kv heads null": {"num_key_value_heads": None},
            "one kv head, head_dim": {"num_key_value_heads": 1, "head_dim": 20},
            "biases": {"attention_bias": True},
            "tied": {"tie_word_embeddings": True},
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 20},
        {
            "biases": {},
            "no attention biases": {"attention_bias": False},
            "head_dim of the family": {"head_dim": 64},
            "one expert, one kv head": {"num_local_experts": 1, "num_experts_per_tok": 1, "num_key_value_heads": 1},
            "layer_types": {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "sliding_window": 5},
            "tied": {"tie_word_embeddings": True},
            "gpt-oss-20b": {
                "vocab_size": 201_088,
                "hidden_size": 2880,
                "intermediate_size": 2880,
                "num_hidden_layers": 24,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "num_local_experts": 32,
                "num_experts_per_tok": 4,
            },
        },
    ),
    "deepseek_v2": Family("DeepseekV2Config", MLA, DEEPSEEK | {"deepseek-v2": DEEPSEEK_V2}),
    "deepseek_v3": Family("DeepseekV3Config", MLA, DEEPSEEK | {"deepseek-v3": DEEPSEEK_V3}),
    "kimi_k2": Family("DeepseekV3Config", MLA, DEEPSEEK | {"kimi-k2": KIMI_K2}),
    "starcoder2": Family(
        "Starcoder2Config",
        GROUPED,
        {
            "biases": {},
            "no biases": {"use_bias": False},
            "untied": {"tie_word_embeddings": False},
            "window, one kv head": {"sliding_window": 7, "num_key_value_heads": 1},
            "head_dim": {"head_dim": 20},
        },
    ),
}
CASES = [
    pytest.param(name, family.base | settings, id=f"{name}-{case}")
    for name, family in FAMILIES.items()
    for case, settings in family.cases.items()
]

BARE: dict[str, Settings] = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 97},
    "llama": SMALL,
    "mistral": SMALL | {"num_attention_heads": 16},
    "mixtral": SMALL | {"num_attention_heads": 16},
    "qwen2": SMALL | {"hidden_size": 64, "num_attention_heads": 32},
    "qwen3": SMALL | {"num_attention_heads": 32},
    "qwen3_moe": SMALL | {"num_attention_heads": 12},
    "gemma2": SMALL | {"num_attention_heads": 12},
    "gemma3_text": SMALL | {"num_attention_heads": 12},
    "gemma3": {"text_config": {}},
    "olmo2": SMALL,
    "gpt_oss": SMALL | {"num_attention_heads": 24},
    "deepseek_v2": SMALL | {"num_experts_per_tok": 6},
    "deepseek_v3": SMALL | {"num_hidden_layers": 5},
    "kimi_k2": SMALL | {"num_hidden_layers": 5},
    "starcoder2": SMALL,
}
"""The least that a file must state; the heads are multiples of the kv heads that the family has by default."""


def built(transformers: Any, torch: Any, family: str, settings: Settings) -> tuple[Any, Any]:
    """Return the config as it is written to a file, and the causal language model that transformers builds of it."""
    make = getattr(transformers, FAMILIES[family].config_class)
    if family == "gemma3" and "text_config" not in settings:
        config = make(text_config=settings, tie_word_embeddings=settings.get("tie_word_embeddings", True))
    else:
        config = make(**settings)
    with on_meta():
        if family == "gemma3":
            return config, transformers.Gemma3ForCausalLM(config.text_config)
        return config, transformers.AutoModelForCausalLM.from_config(config)


def stored(model: Any) -> int:
    """Return the number of elements that a checkpoint of `model` holds; parameters() gives a tied matrix once.

    transformers registers DeepSeek's e_score_correction_bias (one per expert) as a buffer; it is learned and stored
    with the weights, and powerplan counts it as DeepSeek's own code does, as a parameter.
    """
    corrections = (tensor for name, tensor in model.named_buffers() if name.endswith(".e_score_correction_bias"))
    return sum(tensor.numel() for tensor in (*model.parameters(), *corrections))


def applied_windows(model: Any) -> list[int | None]:
    """Return the window that each layer's attention passes on, as the modules of the built model hold it."""
    layers = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    if model.config.model_type in ("mistral", "mixtral", "starcoder2"):
        return [model.config.sliding_window] * len(layers)
    return [getattr(getattr(layer, "self_attn", None), "sliding_window", None) for layer in layers]


def read_windows(spec: ModelSpec) -> list[int | None]:
    windows: dict[int, int | None] = {}
    for use in spec.layer_uses():
        window = use.layer.mixer.window if isinstance(use.layer.mixer, Attention) else None
        windows.update((position, window) for span in use.positions for position in span)
    return [windows[position] for position in range(spec.layer_count)]


def test_these_families_have_several_cases() -> None:
    """Every family has its default config and two odd ones in test_every_decoder.py; these have more."""
    assert set(FAMILIES) == set(BARE)
    assert set(FAMILIES) <= set(supported_families())
    assert all(len(family.cases) >= 4 for family in FAMILIES.values())


# Without a shared expert transformers makes projections of width 0, and torch warns that it initialises nothing.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("form", ["whole", "diff"])
@pytest.mark.parametrize(("family", "settings"), CASES)
def test_written_config(transformers: Any, torch: Any, read: Read, family: str, settings: Settings, form: str) -> None:
    config, model = built(transformers, torch, family, settings)
    written = config.to_dict() if form == "whole" else json.loads(config.to_json_string(use_diff=True))
    spec = read(written | {"model_type": family}).spec
    assert Accounting(spec).total_parameters.with_embeddings == stored(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert spec.tie_embeddings == model.config.tie_word_embeddings == tied
    assert read_windows(spec) == applied_windows(model)


@pytest.mark.parametrize("family", sorted(BARE))
def test_config_that_leaves_out_every_default(transformers: Any, torch: Any, read: Read, family: str) -> None:
    _, model = built(transformers, torch, family, BARE[family])
    spec = read(BARE[family] | {"model_type": family}).spec
    assert Accounting(spec).total_parameters.with_embeddings == stored(model)
    assert read_windows(spec) == applied_windows(model)


@pytest.mark.parametrize("inside", [True, False, None])
@pytest.mark.parametrize("outside", [True, False])
def test_wrapper_decides_on_the_tie(
    transformers: Any, torch: Any, read: Read, outside: bool, inside: bool | None
) -> None:
    text = GROUPED | {"head_dim": 20} | ({} if inside is None else {"tie_word_embeddings": inside})
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    data = {"text_config": text, "vision_config": vision, "tie_word_embeddings": outside}
    with on_meta():
        model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**data))
    decoder = [
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(("model.vision_tower.", "model.multi_modal_projector."))
    ]
    spec = read(data | {"model_type": "gemma3"}).spec
    assert spec.tie_embeddings is outside
    assert Accounting(spec).total_parameters.with_embeddings == sum(decoder)
