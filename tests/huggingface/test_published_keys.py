"""Keys that published files have beside those of their config class: they are read, and change no count."""

from __future__ import annotations

import json
from typing import Any

import pytest

from powerplan.accounting import Accounting
from powerplan.documents import parse_json
from powerplan.errors import InputError
from powerplan.huggingface import read_config
from powerplan.huggingface.defaults import class_defaults
from powerplan.load import load_model

Settings = dict[str, Any]

KEYS: dict[str, Settings] = {
    "glm_moe_dsa": {"num_experts": 256, "moe_layer_freq": 1, "index_share_for_mtp_iteration": True, "ep_size": 1},
    "kimi_linear": {"use_grouped_topk": True, "moe_router_activation_func": "sigmoid", "num_expert_group": 1},
    "mimo_v2_flash": {"layernorm_epsilon": 1e-05, "attention_chunk_size": 128},
    "qwen3_5_moe_text": {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1},
    "qwen3_5_text": {"attn_output_gate": True, "mlp_only_layers": [], "mtp_use_dedicated_embeddings": False},
    "qwen3_moe": {"use_qk_norm": True, "qkv_bias": False, "head_dim": 64},
}
"""What files of these families on the hub say, as far as it made a difference to a reader once."""


def counted(family: str, settings: Settings) -> int:
    data = {**class_defaults(family, nested=True).defaults, "model_type": family, **settings}
    spec, _ = read_config(parse_json(json.dumps(data), "config.json"), "x")
    return Accounting(spec).total_parameters.with_embeddings


@pytest.mark.parametrize("family", sorted(KEYS))
def test_they_are_read(family: str) -> None:
    same = {"head_dim": 64} if family == "qwen3_moe" else {}
    assert counted(family, KEYS[family]) == counted(family, same)


def test_a_gate_that_is_off_is_not_counted() -> None:
    layers, heads, dim, hidden = 8, 16, 256, 4096
    off = counted("qwen3_5_text", {"attn_output_gate": False})
    assert counted("qwen3_5_text", {}) - off == layers * heads * dim * hidden


def test_an_indexer_with_values_is_refused() -> None:
    count = 3
    sparse = {"sparse_attention_freq": [0, 1, 1], "sparse_disable_index_value": [0, 1, 0]}
    settings = {"num_hidden_layers": count, "moe_layer_freq": [0, 1, 1], "sparse_attention_config": sparse}
    with pytest.raises(InputError, match="leaves a sparse layer an indexer with values"):
        counted("minimax_m3_vl_text", settings)


def test_names_of_older_nemotron_files() -> None:
    old = {"hybrid_override_pattern": "M*-", "attention_head_dim": 64, "time_step_rank": 512, "num_hidden_layers": 3}
    new = {"layers_block_type": ["mamba", "attention", "mlp"], "head_dim": 64, "num_hidden_layers": 3}
    base = class_defaults("nemotron_h", nested=True).defaults
    data = {key: value for key, value in base.items() if key not in ("head_dim", "layers_block_type")}

    def read(settings: Settings) -> int:
        text = json.dumps({**data, "model_type": "nemotron_h", **settings})
        return Accounting(read_config(parse_json(text, "config.json"), "x")[0]).total_parameters.with_embeddings

    assert read(old) == read(new)


@pytest.mark.parametrize("family", ["minimax_text_01", "minimax_m1"])
def test_a_whole_file_of_minimax(family: str) -> None:
    """Of the keys of MiniMax-Text-01's config.json none is refused, and none gets a remark."""
    layers, parts = 80, ("full_attention", "linear_attention", "mlp")
    scales = {f"layernorm_{part}_{name}": value for part in parts for name, value in (("alpha", 3.56), ("beta", 1.0))}
    data = scales | {
        "model_type": family,
        "attn_type_list": [int(index % 8 == 7) for index in range(layers)],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "intermediate_size": 9216,
        "max_position_embeddings": 10_240_000,
        "num_attention_heads": 64,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "postnorm": True,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10_000_000,
        "rotary_dim": 64,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 200_064,
    }
    spec, notes = read_config(parse_json(json.dumps(data), "config.json"), "x")
    assert notes == ()
    assert spec.layers == load_model("minimax-text-01").spec.layers
    assert Accounting(spec).total_parameters == Accounting(load_model("minimax-text-01").spec).total_parameters
