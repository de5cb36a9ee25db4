"""A file of each family, with what its config class has as defaults; transformers is not needed."""

from __future__ import annotations

import json
from pathlib import Path

from hf_decoders import NEEDED, Settings

from powerplan.documents import parse_json
from powerplan.huggingface import FAMILIES, read_config
from powerplan.huggingface.defaults import tables
from powerplan.spec import ModelSpec

FLA = json.loads((Path(__file__).parent / "data" / "fla_parameter_counts.json").read_text(encoding="utf-8"))
OF_FLA: dict[str, Settings] = {row["config"]["model_type"]: row["config"] for row in reversed(FLA["models"])}

PLAIN: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
"""What a file of a family states whose code is on the hub alone, beside what is in STATED."""

EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

APRIEL: Settings = {"num_hidden_layers": 2, "hybrid_block_layout": ["t", "m2"], "ssm_cfg": {"d_xb": 128}}

STATED: dict[str, Settings] = {
    **dict.fromkeys(("apriel_hybrid_ssm", "apriel_ssm_thinker_hybrid"), APRIEL),
    **dict.fromkeys(("bailing_moe", "bailing_moe_v2", "deepseek"), EXPERTS),
    "bailing_moe_linear": EXPERTS | {"layer_group_size": 2},
    "Klear": EXPERTS | {"n_shared_experts": 1},
    "arctic": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "baichuan_m1": {"sliding_window": 9, "sliding_window_layers": [1]},
    "grok-1": EXPERTS,
    "jais": {
        "intermediate_size": None,
        "n_inner": 80,
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
    },
    "longcat_flash_ngram": {"num_layers": 2, "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 3, "emb_split_num": 2},
    "openelm": {
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")),
        "num_transformer_layers": 2,
        "model_dim": 48,
        "head_dim": 8,
        "num_query_heads": [4, 6],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
        "ffn_dim_divisor": 8,
    },
    "deci": {"num_key_value_heads_per_layer": [2, 3]},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "kimi_linear": {"first_k_dense_replace": 1},
    "minimax_m1": {"num_hidden_layers": 2, "attn_type_list": [0, 1]},
    "minimax_text_01": {"num_hidden_layers": 2, "attn_type_list": [0, 1]},
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}}] * 2,
        "intermediate_size": None,
    },
    "qwen3_omni_moe_text": {"head_dim": 128},
    "step3p5": {"num_local_experts": 288},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
}
"""What a file of a family must state, as its config class has no default that can be read."""


def default_file(name: str) -> Settings:
    """Return a file of the family with what its config class has as defaults."""
    known = tables().families.get(FAMILIES[name].like or name)
    own = OF_FLA.get(name, PLAIN) if known is None else known.defaults
    return {**own, **FAMILIES[name].defaults} | NEEDED.get(name, {}) | STATED.get(name, {}) | {"model_type": name}


def read(data: Settings) -> tuple[ModelSpec, tuple[str, ...]]:
    """Return the spec of a file, and the remarks on it."""
    return read_config(parse_json(json.dumps(data, indent=2), "config.json"), "model")
