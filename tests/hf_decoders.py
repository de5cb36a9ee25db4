"""The language models that transformers builds, as oracles: their configs, default and odd, and what a model stores."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from powerplan.huggingface.defaults import STATED

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

FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qk_norm", "qk_layernorm")
"""Flags that the second odd config has the other way round, in families that have them."""

OWN: dict[str, Settings] = {
    "afmoe": {"num_dense_layers": 2, "global_attn_every_n_layers": 2},
    "cohere2_moe": {"num_shared_experts": 2, "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 56},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 2}},
    "deepseek_v2": {"first_k_dense_replace": 1},
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
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"head_dim": 128},
}
"""What a family cannot be built without, also in its default config."""

LESS: dict[str, tuple[str, ...]] = {"dbrx": ("tie_word_embeddings",)}
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


def written(config: Any, form: str) -> Settings:
    """Return the config as a file has it: whole, or without what its class has as default but for STATED sizes."""
    if form == "whole":
        return dict(json.loads(config.to_json_string(use_diff=False)))
    stated = {config.attribute_map.get(name, name) for name in STATED} & set(config.to_dict())
    whole = json.loads(config.to_json_string(use_diff=False))
    return {name: whole[name] for name in stated} | dict(json.loads(config.to_json_string(use_diff=True)))


def stored_elements(model: Any) -> int:
    """Return the number of elements that a checkpoint of `model` holds; parameters() gives a tied matrix once.

    transformers registers DeepSeek's e_score_correction_bias (one per expert) as a buffer; it is learned and stored
    with the weights, and powerplan counts it as DeepSeek's own code does, as a parameter. In LongCat-Flash, it makes
    half of each zero expert, which computes nothing and of which no checkpoint has anything.
    """
    corrections = (tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias"))
    stored = sum(tensor.numel() for tensor in (*model.parameters(), *corrections))
    if zero := getattr(model.config, "zero_expert_num", 0):
        halves = [tensor for name, tensor in model.named_parameters() if name.endswith("experts.gate_up_proj")]
        stored -= sum(zero * half[0].numel() for half in halves)
    return stored
