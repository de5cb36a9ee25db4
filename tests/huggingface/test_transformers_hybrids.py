"""Parameters and FLOPs of hybrids, state space and sparse-attention families against transformers' own models."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hf_decoders import require

from powerplan.accounting import Accounting
from powerplan.huggingface import supported_families
from powerplan.load import LoadedModel
from powerplan.mixers.formulas import total

pytestmark = pytest.mark.transformers

Settings = dict[str, Any]
Read = Callable[[Settings], LoadedModel]

SMALL: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
}
LATENT = SMALL | {
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
DSA = LATENT | {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "index_n_heads": 3,
    "index_head_dim": 16,
    "index_topk": 7,
}
KDA = {"num_heads": 3, "head_dim": 20, "short_conv_kernel_size": 3, "full_attn_layers": [2, 5], "kda_layers": [1, 3, 4]}
KIMI = LATENT | {
    "head_dim": 72,
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_shared_experts": 2,
    "linear_attn_config": KDA,
    "pad_token_id": None,
}
NEXT = SMALL | {
    "num_key_value_heads": 2,
    "head_dim": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
LARA = {key: NEXT[key] for key in NEXT if key != "intermediate_size"} | {"sliding_window": 7}
MINIMAX = SMALL | {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}
JAMBA = SMALL | {
    "num_key_value_heads": 2,
    "num_experts": 5,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 7,
    "mamba_d_state": 6,
}
NEMOTRON: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "mamba_num_heads": 8,
    "mamba_head_dim": 10,
    "n_groups": 4,
    "ssm_state_size": 12,
    "hybrid_override_pattern": "M-M*-M-",
}
MAMBA2: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_heads": 8,
    "head_dim": 12,
    "n_groups": 2,
    "state_size": 10,
}
FAMILIES: dict[str, tuple[str, dict[str, Settings]]] = {
    "kimi_linear": (
        "KimiLinearConfig",
        {
            "layers from 1": KIMI,
            "no query latent": KIMI | {"q_lora_rank": None},
            "biases": KIMI | {"attention_bias": True},
            "two dense layers": KIMI | {"first_k_dense_replace": 2, "num_shared_experts": 1},
            "kimi-linear-48b-a3b": {
                "vocab_size": 163_840,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 27,
                "num_attention_heads": 32,
                "linear_attn_config": {
                    "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                    "kda_layers": [layer for layer in range(1, 27) if layer % 4],
                    "head_dim": 128,
                    "num_heads": 32,
                    "short_conv_kernel_size": 4,
                },
            },
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "every fourth layer": NEXT,
            "every second layer": NEXT | {"full_attention_interval": 2},
            "dense layers, biases": NEXT | {"mlp_only_layers": [0, 3], "attention_bias": True},
            "every second layer sparse, tied": NEXT | {"decoder_sparse_step": 2, "tie_word_embeddings": True},
            "no experts": NEXT | {"num_experts": 0},
            "layer_types": NEXT | {"layer_types": ["full_attention"] + ["linear_attention"] * 4},
            "qwen3-next-80b-a3b": {
                "vocab_size": 151_936,
                "hidden_size": 2048,
                "intermediate_size": 5120,
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
            },
        },
    ),
    "lara_mini": (
        "LaraMiniConfig",
        {
            "its pattern": LARA,
            "seven layers, untied": LARA | {"num_hidden_layers": 7, "tie_word_embeddings": False},
            "biases, one key head": LARA | {"attention_bias": True, "linear_num_key_heads": 1},
            "layer_types": LARA | {"layer_types": ["full_attention"] + ["linear_attention"] * 4},
            "lara-4-mini": {
                "vocab_size": 151_936,
                "hidden_size": 1024,
                "num_hidden_layers": 34,
                "num_attention_heads": 16,
            },
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        {
            "every second layer": MINIMAX,
            "layer_types": MINIMAX | {"layer_types": ["linear_attention"] * 4 + ["full_attention"]},
            "head_dim": MINIMAX | {"head_dim": 20},
            "as many kv heads, tied": MINIMAX | {"num_key_value_heads": 6, "tie_word_embeddings": True},
            "minimax-text-01": {
                "vocab_size": 200_064,
                "hidden_size": 6144,
                "intermediate_size": 9216,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "num_local_experts": 32,
                "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
            },
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            "every third layer": JAMBA,
            "rank auto": JAMBA | {"mamba_dt_rank": "auto"},
            "one expert": JAMBA | {"num_experts": 1, "num_experts_per_tok": 1},
            "biases": JAMBA | {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_d_conv": 3},
            "experts in every layer, tied": JAMBA
            | {"expert_layer_period": 1, "expert_layer_offset": 0, "tie_word_embeddings": True, "mamba_expand": 3},
            "jamba-v0.1": {
                "vocab_size": 65_536,
                "hidden_size": 4096,
                "intermediate_size": 14_336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
            },
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "pattern": NEMOTRON,
            "experts": NEMOTRON
            | {
                "hybrid_override_pattern": "MEM*E",
                "n_routed_experts": 5,
                "moe_intermediate_size": 24,
                "moe_shared_expert_intermediate_size": 36,
            },
            "biases": NEMOTRON | {"use_bias": True, "mlp_bias": True, "use_conv_bias": False},
            "old names": NEMOTRON | {"mamba_n_groups": 2, "mamba_d_conv": 3},
            "as many kv heads": NEMOTRON | {"num_key_value_heads": 6, "hybrid_override_pattern": "**M"},
            "nemotron-h-8b": {
                "vocab_size": 131_072,
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
            },
        },
    ),
    "mamba": (
        "MambaConfig",
        {
            "defaults": {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3},
            "biases": {
                "vocab_size": 97,
                "hidden_size": 50,
                "num_hidden_layers": 3,
                "use_bias": True,
                "use_conv_bias": False,
            },
            "untied": {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 1, "tie_word_embeddings": False},
            "rank, expand": {
                "vocab_size": 97,
                "hidden_size": 48,
                "num_hidden_layers": 2,
                "time_step_rank": 5,
                "expand": 3,
                "state_size": 7,
                "conv_kernel": 3,
            },
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "groups": MAMBA2,
            "biases": MAMBA2 | {"use_bias": True, "use_conv_bias": False},
            "tied": MAMBA2 | {"tie_word_embeddings": True, "conv_kernel": 3},
            "expand": MAMBA2 | {"expand": 4, "num_heads": 16},
            "mamba2-2.7b": {
                "vocab_size": 50_288,
                "hidden_size": 2560,
                "num_hidden_layers": 64,
                "num_heads": 80,
                "n_groups": 1,
                "tie_word_embeddings": True,
            },
        },
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        {
            "first layer dense": DSA,
            "all dense": DSA | {"first_k_dense_replace": 5},
            "biases, tied": DSA | {"attention_bias": True, "tie_word_embeddings": True},
            "mlp_layer_types": DSA | {"mlp_layer_types": ["sparse", "dense", "dense", "sparse", "sparse"]},
            "deepseek-v3.2-exp": {
                "vocab_size": 129_280,
                "hidden_size": 7168,
                "intermediate_size": 18_432,
                "num_hidden_layers": 61,
                "num_attention_heads": 128,
            },
        },
    ),
}
CASES = [
    pytest.param(family, settings, id=f"{family}-{case}")
    for family, (_, cases) in FAMILIES.items()
    for case, settings in cases.items()
]
COUNTED = ("e_score_correction_bias",)
"""Buffers of transformers that are stored with the weights, and that powerplan counts as parameters."""


def build(transformers: Any, torch: Any, family: str, settings: Settings, device: str, **options: Any) -> Any:
    require(transformers, family)
    config = getattr(transformers, FAMILIES[family][0])(**settings)
    with torch.device(device):
        return config, transformers.AutoModelForCausalLM.from_config(config, **options)


def stored(model: Any) -> int:
    corrections = (tensor for name, tensor in model.named_buffers() if name.endswith(COUNTED))
    return sum(tensor.numel() for tensor in (*model.parameters(), *corrections))


def test_every_family_of_transformers_has_cases() -> None:
    assert set(FAMILIES) < set(supported_families())
    assert all(len(cases) >= 4 for _, cases in FAMILIES.values())


@pytest.mark.parametrize("form", ["stated", "whole", "diff"])
@pytest.mark.parametrize(("family", "settings"), CASES)
def test_parameters(transformers: Any, torch: Any, read: Read, family: str, settings: Settings, form: str) -> None:
    """From what is stated, from the whole config that transformers writes, and from what differs from its defaults."""
    config, model = build(transformers, torch, family, settings, "meta")
    written = {
        "stated": lambda: settings,
        "whole": config.to_dict,
        "diff": lambda: json.loads(config.to_json_string(use_diff=True)) | settings,
    }[form]()
    spec = read(written | {"model_type": family}).spec
    assert Accounting(spec).total_parameters.with_embeddings == stored(model)
    assert spec.layer_count == model.config.num_hidden_layers
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert spec.tie_embeddings == model.config.tie_word_embeddings == tied


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_what_is_multiplied(transformers: Any, torch: Any, read: Read, family: str, settings: Settings) -> None:
    """The parameters behind weight FLOPs are those of two dimensions and more: matrices, convolutions, experts."""
    _, model = build(transformers, torch, family, settings, "meta")
    table = model.get_input_embeddings().weight
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter is not table and not name.endswith("A_log")
    ]
    spec = read(settings | {"model_type": family}).spec
    counted = 0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size
    for use in spec.layer_uses():
        for block in (use.layer.mixer, use.layer.ffn):
            terms = (
                () if block is None else (*block.matmul_terms(spec.hidden_size), *block.idle_terms(spec.hidden_size))
            )
            counted += use.count * int(total(terms))
    assert counted == sum(parameter.numel() for parameter in matrices)


@pytest.mark.parametrize(("family", "original"), [("minimax_text_01", True), ("minimax_m1", True), ("minimax", False)])
def test_minimax_by_all_its_names(read: Read, family: str, original: bool) -> None:
    kinds = [0, 0, 0, 0, 1]
    types = ["full_attention" if kind else "linear_attention" for kind in kinds]
    named = {"attn_type_list": kinds} if original else {"layer_types": types}
    spec = read(MINIMAX | named | {"model_type": family}).spec
    assert [layer.mixer.kind for group in spec.layers for _ in range(group.repeat) for layer in group.period] == [
        "attention" if kind else "lightning" for kind in kinds
    ]
