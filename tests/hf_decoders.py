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

MAMBA: Settings = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 12, "num_key_value_heads": 2}
OWN: dict[str, Settings] = {
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
}
"""What both odd configs of a family set besides: for families whose sizes have other names or must fit together."""

LESS: dict[str, tuple[str, ...]] = {
    "zamba": ("tie_word_embeddings",),
    "zamba2": ("tie_word_embeddings",),
}
"""Flags of a family that stay as they are in the second odd config: its code cannot be built with them."""

NEEDED: dict[str, Settings] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
}
"""What the default config of a family must set, as its class cannot be built without."""


def odd_settings(config_class: Any, model_type: str, flip: bool) -> Settings:
    """Return settings unlike the default: other sizes, and with `flip` one layer more and flags the other way round."""
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    stored = {name: config_class.attribute_map.get(name, name) for name in ODD}
    settings = {stored[name]: value for name, value in ODD.items() if stored[name] in fields}
    if flip:
        settings |= {stored["num_hidden_layers"]: 4, stored["vocab_size"]: 101}
        flags = [name for name in FLAGS if isinstance(fields.get(name), bool) and name not in LESS.get(model_type, ())]
        settings |= {name: not fields[name] for name in flags}
    return settings | NEEDED.get(model_type, {}) | OWN.get(model_type, {})


def written(config: Any, form: str) -> Settings:
    """Return the config as a file has it: whole, or without what its class has as default but for STATED sizes."""
    if form == "whole":
        return dict(json.loads(config.to_json_string(use_diff=False)))
    stated = {config.attribute_map.get(name, name) for name in STATED} & set(config.to_dict())
    whole = json.loads(config.to_json_string(use_diff=False))
    return {name: whole[name] for name in stated} | dict(json.loads(config.to_json_string(use_diff=True)))


def stored_elements(model: Any) -> int:
    """Return the number of elements that a checkpoint of `model` holds; parameters() gives a tied matrix once.

    transformers registers biases of routers (one per expert) as buffers; they are learned and stored
    with the weights, and powerplan counts them as DeepSeek's own code does, as parameters.
    """
    learned = ("e_score_correction_bias", ".expert_bias")
    corrections = (tensor for name, tensor in model.named_buffers() if name.endswith(learned))
    return sum(tensor.numel() for tensor in (*model.parameters(), *corrections))
