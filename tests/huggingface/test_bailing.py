"""Ling and Ring with linear attention: 2.0 (bailing_moe_linear), and 2.5 and 3.0, which share a model_type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hf_decoders import Settings, mixers_by_layer

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.load import LoadedModel, catalogue_spec
from powerplan.mixers import KDA, MLA, Attention, Lightning

Read = Callable[[Settings], LoadedModel]

RING_MINI: Settings = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "group_norm_size": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "layer_group_size": 5,
    "linear_silu": False,
    "max_position_embeddings": 131_072,
    "model_type": "bailing_moe_linear",
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 512,
    "n_group": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": 157_184,
}
RING_FLASH: Settings = RING_MINI | {
    "group_norm_size": 8,
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "layer_group_size": 8,
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}

V25: Settings = {
    "model_type": "bailing_hybrid",
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_shared_experts": 2,
    "moe_intermediate_size": 24,
    "head_dim": 12,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
    "use_qk_norm": True,
}

LING_3: Settings = {
    "architectures": ["BailingMoeV3ForCausalLM"],
    "model_type": "bailing_hybrid",
    "num_hidden_layers": 42,
    "layer_group_size": 6,
    "first_k_dense_replace": 2,
    "n_group": 8,
    "topk_group": 4,
    "hidden_size": 2560,
    "vocab_size": 157_184,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_experts": 512,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "moe_shared_expert_intermediate_size": 768,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_head_dim": 192,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 128,
    "short_conv_kernel_size": 4,
    "num_nextn_predict_layers": 1,
    "mtp_use_kda": False,
    "gated_attention_proj_granularity_type": "head_wise",
    "use_kda_lora": False,
    "no_kda_lora": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "use_mla_nope": False,
    "use_nGPT": False,
    "intermediate_size": 6144,
    "use_qk_norm": True,
    "linear_silu": True,
    "group_norm_size": 1,
    "moe_router_enable_expert_bias": True,
    "num_kv_heads_for_linear_attn": 0,
    "rotary_dim": 64,
    "rope_theta": 6_000_000.0,
    "max_position_embeddings": 262_144,
    "kda_safe_gate": True,
    "kda_lower_bound": -5.0,
    "expert_swiglu_limit_list": [0] * 42,
}


def counted(loaded: LoadedModel) -> int:
    return Accounting(loaded.spec).total_parameters.with_embeddings


def test_ring_mini_linear(read: Read) -> None:
    """16.4 billion parameters, as mlx-lm's model has to the digit, and 957 million active ones (arXiv 2510.19338)."""
    loaded = read(RING_MINI)
    hidden, inner, expert = 2048, 16 * 128, 3 * 2048 * 512
    linear = 4 * hidden * inner + inner * hidden + inner + 2 * 128
    grouped = 2 * hidden * inner + 2 * hidden * 4 * 128 + 2 * 128
    experts = 19 * (257 * expert + 256 * hidden + 256)
    rest = 20 * 2 * hidden + 3 * hidden * 5120 + (2 * 157_184 + 1) * hidden
    assert counted(loaded) == 16 * linear + 4 * grouped + experts + rest == 16_423_448_320
    assert round(Accounting(loaded.spec).active_parameters.without_embeddings / 1e6) == 957
    assert loaded.notes == ()


def test_ring_flash_linear(read: Read) -> None:
    """104 billion parameters, 6.1 of them active and none of the embeddings (arXiv 2510.19338, which cuts 6.157)."""
    accounting = Accounting(read(RING_FLASH).spec)
    assert round(accounting.total_parameters.with_embeddings / 1e9) == 104
    assert accounting.active_parameters.without_embeddings // 10**8 == 61


def test_layers_state_and_cache_of_ring(read: Read) -> None:
    """Every fifth layer has a cache: 4 heads of 128 keys and values. The others a state of 16 x 128 x 128."""
    spec = read(RING_MINI).spec
    mixers = mixers_by_layer(spec)
    linear = Lightning(heads=16, head_dim=128, output_norm="full", chunk_size=64)
    full = Attention(heads=16, kv_heads=4, head_dim=128, qk_norm="head")
    assert mixers == [full if (index + 1) % 5 == 0 else linear for index in range(20)]
    row = Accounting(spec).row("128k")
    assert row.state_elements == 4 * 2 * 4 * 128 * 131_072 + 16 * 16 * 128 * 128


def test_layers_beyond_whole_groups_have_softmax_attention(read: Read) -> None:
    mixers = mixers_by_layer(read(RING_MINI | {"num_hidden_layers": 12}).spec)
    assert [index for index, mixer in enumerate(mixers) if isinstance(mixer, Attention)] == [4, 9, 10, 11]
    short = mixers_by_layer(read(RING_MINI | {"num_hidden_layers": 3}).spec)
    assert [type(mixer) for mixer in short] == [Attention] * 3


def test_biases_and_norms_of_linear_attention(read: Read) -> None:
    """use_qkv_bias is on queries, keys and values of both kinds; use_bias on outputs, MLPs and shared experts."""
    base = counted(read(RING_MINI))
    linear, grouped = 16 * 3 * 2048, 4 * (2048 + 2 * 512)
    assert counted(read(RING_MINI | {"use_qkv_bias": True})) - base == linear + grouped
    mlps = 2 * 5120 + 2048 + 19 * (2 * 512 + 2048)
    output = counted(read(RING_MINI | {"use_bias": True})) - base
    assert output == 16 * 2048 + 4 * (2048 + 2 * 512 + 2048) + mlps
    assert base - counted(read(RING_MINI | {"use_qk_norm": False})) == 20 * 2 * 128


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({}, 149_871),
        (
            {
                "vocab_size": 157_184,
                "hidden_size": 8192,
                "intermediate_size": 18_432,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 64,
                "num_experts": 8,
                "num_experts_per_tok": 8,
                "num_shared_experts": 1,
                "moe_intermediate_size": 2048,
                "first_k_dense_replace": 4,
                "head_dim": 128,
                "layer_group_size": 8,
                "group_norm_size": 8,
                "kv_lora_rank": 512,
                "q_lora_rank": 1536,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "qk_nope_head_dim": 128,
            },
            63_425_837_152,
        ),
    ],
)
def test_ring_2_5(read: Read, settings: Settings, parameters: int) -> None:
    """Counts are those of BailingMoeV2_5's own code, with the router's bias; the second is Ring-2.5-1T of 8 experts."""
    loaded = read(V25 | settings)
    assert counted(loaded) == parameters
    assert {type(mixer) for mixer in mixers_by_layer(loaded.spec)} == {Lightning, MLA}
    assert {mixer.output_gate for mixer in mixers_by_layer(loaded.spec) if isinstance(mixer, MLA)} == {False}


def test_ring_1t_has_a_trillion(read: Read) -> None:
    large = {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "head_dim": 128,
        "vocab_size": 157_184,
    }
    experts = {"num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "moe_intermediate_size": 2048}
    latent = {
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }
    rest = {"intermediate_size": 18_432, "layer_group_size": 8, "group_norm_size": 8, "first_k_dense_replace": 4}
    assert round(counted(read(V25 | large | experts | latent | rest)) / 1e12, 2) == 1.01


def test_ling_3_as_published(read: Read) -> None:
    """The file of Ling-3.0-flash has keys that transformers' class does not know: it is the catalogue's model."""
    loaded = read(LING_3)
    assert loaded.spec.layers == catalogue_spec("ling-3.0-flash").layers
    assert loaded.notes == ("multi-token-prediction layers (num_nextn_predict_layers) are not counted",)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, Lightning),
        ({"architectures": None}, Lightning),
        ({"architectures": ["BailingMoeV2_5ForCausalLM"], "group_norm_size": None}, Lightning),
        ({"short_conv_kernel_size": 4, "group_norm_size": 1}, KDA),
        ({"architectures": ["BailingMoeV3ForCausalLM"], "group_norm_size": None}, KDA),
    ],
)
def test_which_of_the_two_a_file_is(read: Read, settings: Settings, kind: type) -> None:
    assert kind in {type(mixer) for mixer in mixers_by_layer(read(V25 | settings).spec)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RING_MINI | {"group_norm_size": 3}, "group_norm_size 3 does not divide num_attention_heads 16"),
        (
            RING_MINI | {"num_kv_heads_for_linear_attn": 4},
            "num_kv_heads_for_linear_attn 4 is not num_attention_heads 16, and",
        ),
        (RING_MINI | {"layer_group_size": None}, "bailing_moe_linear needs layer_group_size, and it is null"),
        (V25 | {"use_qkv_bias": True}, "use_qkv_bias true is not supported: no published Ling 2.5 has it"),
        (LING_3 | {"no_kda_lora": False}, "no_kda_lora false is not supported: no published Ling 3.0 has it"),
        (LING_3 | {"use_mla_nope": True}, "use_mla_nope true is not supported"),
        (LING_3 | {"group_norm_size": 4}, "group_norm_size is not 1, and KDA has a norm per head"),
        (
            LING_3 | {"gated_attention_proj_granularity_type": "token_wise"},
            "gated_attention_proj_granularity_type 'token_wise' is not supported; supported is head_wise",
        ),
    ],
)
def test_refusals(read: Read, settings: Settings, message: str) -> None:
    with pytest.raises(InputError) as error:
        read(settings)
    assert message in str(error.value)
