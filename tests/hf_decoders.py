"""The language models that transformers builds, as oracles: their configs, default and odd, and what a model stores."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from powerplan.huggingface.defaults import STATED
from powerplan.mixers import Mixer
from powerplan.spec import ModelSpec

Settings = dict[str, Any]

ODD: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes of the odd configs, in families that have these fields."""

FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qk_norm", "qk_layernorm"),
    *("attention_out_bias", "use_qkv_bias", "enable_bias", "norm_bias", "decoder_bias", "classifier_bias", "bias"),
    *("use_parallel_residual", "use_post_norm", "multi_query", "parallel_attn", "new_decoder_architecture"),
    *("do_layer_norm_before", "layer_norm_elementwise_affine"),
)
"""Flags that the second odd config has the other way round, in families that have them."""

MAMBA: Settings = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 12, "num_key_value_heads": 2}
OWN: dict[str, Settings] = {
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global", "local"], 1], [["local"], 1]]},
    "helium": {"head_dim": 8},
    "bailing_hybrid": {"num_key_value_heads": None, "kv_lora_rank": 28, "qk_rope_head_dim": 4, "layer_group_size": 2},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": None},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 1},
    "gemma4_text": {"num_hidden_layers": 7, "per_layer_config": {"5": {"head_dim": 24}, "6": {"head_dim": 24}}},
    "granitemoehybrid": MAMBA | {"shared_intermediate_size": 40},
    "lfm2": {"full_attn_idxs": [1]},
    "zamba": {"num_hidden_layers": 11, "attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 12, "head_dim": 8, "n_groups": 2},
    "zamba2": {
        "n_mamba_heads": 4,
        "num_mem_blocks": 2,
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid"],
    },
    "afmoe": {"num_dense_layers": 2, "global_attn_every_n_layers": 2},
    "cohere2_moe": {"num_shared_experts": 2, "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 56},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 2}},
    "deepseek_v2": {"first_k_dense_replace": 1},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 20, "compress_ratios": [0, 4, 128, 4], "num_hash_layers": 1},
    "ernie4_5_moe": {"moe_layer_interval": 2},
    "glm_moe_dsa": {"index_topk_freq": 2, "index_skip_topk_offset": 1},
    "granitemoe_swa": {"shared_intermediate_size": 40},
    "granitemoeshared": {"shared_intermediate_size": 40},
    "hy_v4": {"hc_mult": 3},
    "laguna": {"num_hidden_layers": 3, "num_attention_heads_per_layer": [6, 4, 8], "gating": "per-element"},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 80,
        "n_routed_experts": 5,
        "zero_expert_num": 3,
        "moe_topk": 2,
    },
    "mimo_v2_flash": {"num_attention_heads": 8},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 3,
        "moe_layer_freq": [0, 1, 1],
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_n_heads": 2,
    },
    "nemotron_h": {"moe_latent_size": 20, "layers_block_type": ["mamba", "moe", "attention", "mlp"]},
}
"""What both odd configs of a family set besides: for families whose sizes have other names or must fit together."""

NEEDED: dict[str, Settings] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 2},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
}
"""What a family cannot be built without, also in its default config."""

TOWERS = {"phi4_multimodal": "model.embed_tokens_extend."}
"""Parameters of causal language models that are not of the text decoder, by the start of their names."""

LESS: dict[str, tuple[str, ...]] = {
    "dbrx": ("tie_word_embeddings",),
    "zamba": ("tie_word_embeddings",),
    "zamba2": ("tie_word_embeddings",),
}
"""Flags of a family that stay as they are in the second odd config: its code cannot be built with them."""


def odd_settings(config_class: Any, model_type: str, flip: bool) -> Settings:
    """Return settings unlike the default: other sizes, and with `flip` one layer more and flags the other way round."""
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    stored = {name: config_class.attribute_map.get(name, name) for name in ODD}
    settings = {stored[name]: value for name, value in ODD.items() if stored[name] in fields}
    if flip:
        settings |= {stored["num_hidden_layers"]: 4, stored["vocab_size"]: 101}
        flags = [name for name in FLAGS if isinstance(fields.get(name), bool) and name not in LESS.get(model_type, ())]
        settings |= {name: not fields[name] for name in flags}
    return settings | OWN.get(model_type, {}) | NEEDED.get(model_type, {})


def require(transformers: Any, model_type: str) -> None:
    """Skip the test where the installed transformers is older than a model_type."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")


def written(config: Any, form: str) -> Settings:
    """Return the config as a file has it: whole, or without what its class has as default but for STATED sizes."""
    if form == "whole":
        return dict(json.loads(config.to_json_string(use_diff=False)))
    stated = {config.attribute_map.get(name, name) for name in STATED} & set(config.to_dict())
    whole = json.loads(config.to_json_string(use_diff=False))
    return {name: whole[name] for name in stated} | dict(json.loads(config.to_json_string(use_diff=True)))


def stored_elements(model: Any) -> int:
    """Return the number of elements that a checkpoint of `model` holds; parameters() gives a tied matrix once.

    transformers registers biases of routers (one per expert) as buffers; they are learned and stored with the weights,
    and powerplan counts them as DeepSeek's own code does, as parameters. In LongCat-Flash, it makes half of each zero
    expert, which computes nothing and of which no checkpoint has anything.
    """
    learned = ("e_score_correction_bias", ".expert_bias")
    tower = TOWERS.get(model.config.model_type, "no tower")
    parameters = (tensor for name, tensor in model.named_parameters() if not name.startswith(tower))
    corrections = (tensor for name, tensor in model.named_buffers() if name.endswith(learned))
    stored = sum(tensor.numel() for tensor in (*parameters, *corrections))
    if zero := getattr(model.config, "zero_expert_num", 0):
        halves = [tensor for name, tensor in model.named_parameters() if name.endswith("experts.gate_up_proj")]
        stored -= sum(zero * half[0].numel() for half in halves)
    return stored


def mixers_by_layer(spec: ModelSpec) -> list[Mixer]:
    """Return the mixer of each layer that has one, in the order of the model."""
    layers = [layer for group in spec.layers for layer in group.period * group.repeat]
    return [layer.mixer for layer in layers if layer.mixer is not None]
