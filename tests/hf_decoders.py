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

FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qk_norm", "qk_layernorm"),
    *("attention_out_bias", "use_qkv_bias", "enable_bias", "norm_bias", "decoder_bias", "classifier_bias", "bias"),
    *("use_parallel_residual", "use_post_norm", "multi_query", "parallel_attn", "new_decoder_architecture"),
    *("do_layer_norm_before", "layer_norm_elementwise_affine"),
)
"""Flags that the second odd config has the other way round, in families that have them."""

OWN: dict[str, Settings] = {
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global", "local"], 1], [["local"], 1]]},
    "helium": {"head_dim": 8},
}
"""What both odd configs of a family set besides: for families whose sizes have other names or must fit together."""

NEEDED: dict[str, Settings] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 2},
}
"""What a family cannot be built without, also in its default config."""

TOWERS = {"phi4_multimodal": "model.embed_tokens_extend."}
"""Parameters of causal language models that are not of the text decoder, by the start of their names."""

LESS: dict[str, tuple[str, ...]] = {}
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
    with the weights, and powerplan counts it as DeepSeek's own code does, as a parameter.
    """
    tower = TOWERS.get(model.config.model_type, "no tower")
    parameters = (tensor for name, tensor in model.named_parameters() if not name.startswith(tower))
    corrections = (tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias"))
    return sum(tensor.numel() for tensor in (*parameters, *corrections))
