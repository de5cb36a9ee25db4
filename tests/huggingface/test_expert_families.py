"""Families with mixtures of experts: windows, heads and experts by layer, spellings of keys, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.ffn import MLP, MoE
from powerplan.load import LoadedModel
from powerplan.mixers import Attention, ChunkedAttention, IndexedBlocks
from powerplan.spec import Layer, ModelSpec

Settings = dict[str, Any]
Read = Callable[[Settings], LoadedModel]

GROUPED: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def layers(spec: ModelSpec) -> list[Layer]:
    return [layer for group in spec.layers for layer in group.period * group.repeat]


def windows(spec: ModelSpec) -> list[int | None]:
    return [layer.mixer.window for layer in layers(spec) if isinstance(layer.mixer, Attention)]


def sparse(spec: ModelSpec) -> list[bool]:
    return [isinstance(layer.ffn, MoE) for layer in layers(spec) if layer.ffn is not None]


def refused(read: Read, config: Settings, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(config)


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("qwen2_moe", {}, [None] * 6),
        ("qwen2_moe", {"sliding_window": 9}, [None] * 6),
        ("qwen2_moe", {"sliding_window": 9, "use_sliding_window": True}, [9, None] * 3),
        (
            "qwen2_moe",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3},
            [9, None, 9, None, None, None],
        ),
        ("dots1", {"sliding_window": 9, "n_routed_experts": 4}, [None] * 6),
        ("dots1", {"sliding_window": 9, "n_routed_experts": 4, "max_window_layers": 4}, [None] * 4 + [9, 9]),
        ("exaone_moe", {"sliding_window": 9}, [9, 9, 9, None, 9, 9]),
        ("exaone_moe", {"sliding_window": None}, [None] * 6),
        (
            "exaone_moe",
            {"sliding_window": 9, "sliding_window_pattern": "LLG", "layer_types": [SLIDING, SLIDING, FULL] * 2},
            [9, 9, None, 9, 9, None],
        ),
        ("flint", {"sliding_window": 9}, [None, None, 9, 9, 9, None]),
        ("kolibri1", {}, [513, 513, 513, 513, None, 513]),
        ("granitemoe_swa", {}, [None, 128, 128, 128, None, 128]),
        ("afmoe", {"sliding_window": 9, "global_attn_every_n_layers": 3}, [9, 9, None, 9, 9, None]),
        ("mellum", {"sliding_window": 9}, [None] * 6),
        ("mellum", {"sliding_window": 9, "layer_types": [SLIDING] * 5 + [FULL]}, [9] * 5 + [None]),
        ("laguna", {"layer_types": [SLIDING] * 5 + [FULL]}, [512] * 5 + [None]),
        ("cohere2_moe", {"sliding_window": 9}, [9, 9, 9, None, 9, 9]),
        ("cohere2_moe", {"sliding_window": 9, "first_k_dense_replace": 1}, [None, 9, 9, 9, None, 9]),
        ("phimoe", {"sliding_window": 9}, [9] * 6),
        ("mimo_v2_flash", {"num_attention_heads": 8}, [None, 129, 129, 129, 129, None]),
        ("mimo_v2_flash", {"num_attention_heads": 8, "sliding_window_size": 9}, [None, 10, 10, 10, 10, None]),
        ("llama4_text", {}, [8192, 8192, 8192, None, 8192, 8192]),
        ("llama4_text", {"no_rope_layers": [1, 0] * 3, "attention_chunk_size": 9}, [9, None] * 3),
    ],
)
def test_windows(read: Read, family: str, settings: Settings, expected: list[int | None]) -> None:
    assert windows(read({"model_type": family} | GROUPED | settings).spec) == expected


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("glm4_moe", {}, [0]),
        ("exaone_moe", {"first_k_dense_replace": 2}, [0, 1]),
        ("exaone_moe", {"first_k_dense_replace": 6, "moe_intermediate_size": 24, "num_experts": 5}, [0, 1, 2, 3, 4, 5]),
        ("qwen3_moe", {"num_experts": 0, "moe_intermediate_size": 24}, [0, 1, 2, 3, 4, 5]),
        ("flint", {}, [0, 1]),
        ("flint", {"mlp_only_layers": []}, []),
        ("hy_v3", {}, [0]),
        ("mellum", {}, []),
        ("solar_open", {}, []),
        ("afmoe", {"num_dense_layers": 2}, [0, 1]),
        ("llama4_text", {}, []),
        ("llama4_text", {"interleave_moe_layer_step": 2}, [0, 2, 4]),
        ("llama4_text", {"moe_layers": [1, 5]}, [0, 2, 3, 4]),
        ("mimo_v2_flash", {"num_attention_heads": 8, "moe_layer_freq": [0, 0, 1, 1, 1, 1]}, [0, 1]),
        ("ernie4_5_moe", {"moe_layer_start_index": 2, "moe_layer_end_index": 4}, [0, 1, 5]),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, [0, 2, 4]),
        ("laguna", {"mlp_layer_types": ["dense", "sparse"] * 3}, [0, 2, 4]),
        ("bailing_moe", {"num_experts": 5, "moe_intermediate_size": 24, "first_k_dense_replace": 1}, [0]),
        ("minimax_m3_vl_text", {"moe_layer_freq": [0, 1, 1, 1, 1, 1]}, [0]),
    ],
)
def test_dense_layers(read: Read, family: str, settings: Settings, expected: list[int]) -> None:
    is_sparse = sparse(read({"model_type": family} | GROUPED | settings).spec)
    assert [index for index, has_experts in enumerate(is_sparse) if not has_experts] == expected


def test_llama4_attends_in_chunks_where_it_rotates(read: Read) -> None:
    spec = read({"model_type": "llama4_text", "attention_chunk_size": 9} | GROUPED).spec
    assert [type(layer.mixer) for layer in layers(spec)] == [ChunkedAttention] * 3 + [Attention] + [
        ChunkedAttention
    ] * 2
    moe = layers(spec)[0].ffn
    assert isinstance(moe, MoE)
    assert (moe.experts, moe.intermediate_size, moe.shared_intermediate_size) == (16, 80, 80)
    config = {"model_type": "llama4_text", "attention_chunk_size": None} | GROUPED
    assert windows(read(config).spec) == [None] * 6
    stated = {"layer_types": ["chunked_attention"] * 5 + [FULL]}
    refused(read, config | stated, "attention_chunk_size is null, and there are layers of chunked_attention")
    refused(read, config | {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 6 layers")


def test_llama4_within_its_wrapper(read: Read) -> None:
    text = GROUPED | {"model_type": "llama4_text"}
    loaded = read({"model_type": "llama4", "text_config": text})
    assert loaded.spec.layers == read(text).spec.layers
    assert loaded.notes[0] == "llama4: the text decoder alone is counted, other towers and projectors are not"


def test_mimo_as_published(read: Read) -> None:
    """The keys of XiaomiMiMo/MiMo-V2-Flash, at small sizes: full and sliding layers have heads of their own."""
    published = {
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "attention_chunk_size": 8,
        "head_dim": 12,
        "v_head_dim": 8,
        "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "n_routed_experts": 5,
        "n_shared_experts": None,
        "num_attention_heads": 8,
        "sliding_window": 8,
        "sliding_window_size": 8,
        "swa_head_dim": 12,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 4,
        "swa_v_head_dim": 8,
    }
    spec = read({"model_type": "mimo_v2_flash", "moe_intermediate_size": 24} | GROUPED | published).spec
    full = Attention(heads=8, kv_heads=2, head_dim=12, v_head_dim=8)
    sliding = Attention(heads=8, kv_heads=4, head_dim=12, v_head_dim=8, window=9, sinks=True)
    assert [layer.mixer for layer in layers(spec)] == [full, *[sliding] * 4, full]
    assert sparse(spec) == [False, *[True] * 5]


def test_gates_have_no_bias(read: Read) -> None:
    """AFMoE's attention_bias is not for the gate: it counts apart, with as many FLOPs."""
    plain, biased = (
        read({"model_type": "afmoe", "head_dim": 8, "attention_bias": bias} | GROUPED).spec for bias in (False, True)
    )
    more = 6 * ((6 + 2 * 2) * 8 + 48)
    counts = [Accounting(spec).total_parameters.with_embeddings for spec in (plain, biased)]
    flops = [Accounting(spec).weight_flops_per_token for spec in (plain, biased)]
    assert counts[1] - counts[0] == more
    assert flops[0] == flops[1]


def test_laguna_heads_by_layer(read: Read) -> None:
    heads = {"num_attention_heads_per_layer": [6, 4, 8, 6, 4, 8], "head_dim": 8}
    mixers = [layer.mixer for layer in layers(read({"model_type": "laguna"} | GROUPED | heads).spec)]
    assert [mixer.heads for mixer in mixers if isinstance(mixer, Attention)] == [6, 4, 8, 6, 4, 8]
    config = {"model_type": "laguna"} | GROUPED | {"num_attention_heads_per_layer": [6]}
    refused(read, config, "num_attention_heads_per_layer has 1 entries for 6 layers")


def test_hunyuan_as_published(read: Read) -> None:
    """The keys of tencent/Hunyuan-A13B-Instruct, at small sizes: lists with an entry per layer."""
    published = {
        "model_type": "hunyuan_v1_moe",
        "head_dim": 8,
        "moe_intermediate_size": [80] * 6,
        "moe_topk": [2] * 6,
        "num_experts": 5,
        "num_shared_expert": [1] * 6,
        "use_cla": False,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
    }
    config = {key: value for key, value in GROUPED.items() if key != "num_experts_per_tok"} | published
    moe = MoE(experts=5, top_k=2, intermediate_size=80, shared_intermediate_size=80)
    assert {layer.ffn for layer in layers(read(config).spec)} == {moe}
    refused(read, config | {"moe_topk": [2, 3] * 3}, "moe_topk must be the same in each of 6 layers, and is [2, 3")
    refused(read, config | {"moe_topk": [2]}, "moe_topk must be the same in each of 6 layers, and is [2]")
    refused(read, config | {"use_cla": True}, "use_cla true is not supported: layers that share keys and values")
    refused(read, config | {"num_shared_expert": 2}, "num_shared_expert 2 is not supported: transformers' hunyuan")
    refused(read, config | {"use_qk_norm": False}, "use_qk_norm false is not supported: transformers' hunyuan")


def test_ling_mini(read: Read) -> None:
    """Ling-mini-2.0 as published, 16 billion parameters: qk-norm, a router bias, one shared expert, one dense layer."""
    config = {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe",
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "max_window_layers": 20,
        "moe_intermediate_size": 512,
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 20,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "tie_word_embeddings": False,
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "vocab_size": 157_184,
    }
    hidden, expert = 2048, 3 * 2048 * 512
    attention = 2 * hidden * 16 * 128 + 2 * hidden * 4 * 128 + 2 * 128
    experts = 19 * (257 * expert + 256 * hidden + 256)
    embeddings = 2 * 157_184 * hidden + hidden
    count = 20 * (attention + 2 * hidden) + 3 * hidden * 5120 + experts + embeddings
    assert Accounting(read(config).spec).total_parameters.with_embeddings == count == 16_255_643_392


def test_both_spellings_of_the_active_experts(read: Read) -> None:
    """gpt-oss is published with experts_per_token and num_experts_per_tok; transformers reads the second."""
    config = {"model_type": "gpt_oss", "experts_per_token": 4, "num_local_experts": 8} | GROUPED
    ffn = layers(read(config).spec)[0].ffn
    assert isinstance(ffn, MoE)
    assert ffn.top_k == 2


@pytest.mark.parametrize("latent", [None, 20])
def test_nemotron_experts_in_a_latent_space(read: Read, latent: int | None) -> None:
    config = {"model_type": "nemotron_h", "hybrid_override_pattern": "ME*E", "moe_latent_size": latent} | GROUPED
    experts = layers(read(config | {"mlp_bias": True}).spec)[1]
    assert isinstance(experts.ffn, MoE)
    assert experts.ffn.latent_size == latent
    width = experts.ffn.shared_intermediate_size
    (biases,) = experts.extras
    assert (biases.vectors, biases.elements) == ((2, width + 20) if latent else (1, width))


def test_minimax_m2_as_published(read: Read) -> None:
    published = {
        "model_type": "minimax_m2",
        "attn_type_list": [1] * 6,
        "head_dim": 8,
        "mtp_transformer_layers": 1,
        "num_local_experts": 5,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
    }
    loaded = read(published | GROUPED)
    assert layers(loaded.spec)[0].mixer == Attention(heads=6, kv_heads=2, head_dim=8, qk_norm="full")
    assert "multi-token-prediction layers (num_nextn_predict_layers) are not counted" in loaded.notes
    config = published | GROUPED | {"attn_type_list": [0] + [1] * 5}
    refused(read, config, "attn_type_list has a layer that is not softmax attention, and MiniMax-M2 has none")


def test_minimax_m3_as_published(read: Read) -> None:
    """The sizes of the indexer are in sparse_attention_config, which also says which layers have one."""
    sizes = {"sparse_num_index_heads": 2, "sparse_index_dim": 4, "sparse_block_size": 8, "sparse_topk_blocks": 3}
    frequency = {"sparse_attention_freq": [0, 1, 1, 1, 1, 1], "sparse_local_block": 1}
    config = {"model_type": "minimax_m3_vl_text", "head_dim": 8, "num_local_experts": 5} | GROUPED
    mixers = [layer.mixer for layer in layers(read(config | {"sparse_attention_config": sizes | frequency}).spec)]
    heads: Settings = {"heads": 6, "kv_heads": 2, "head_dim": 8, "qk_norm": "head"}
    indexed = IndexedBlocks(**heads, index_heads=2, index_head_dim=4, block_size=8, top_k=3)
    assert mixers == [Attention(**heads), *[indexed] * 5]
    typed = read(config | {"layer_types": [FULL, *["minimax_m3_sparse"] * 5]}).spec
    assert layers(typed)[1].mixer == IndexedBlocks(**heads, index_heads=4, index_head_dim=128, block_size=128, top_k=16)


def test_ernie_for_images_and_text(read: Read) -> None:
    text = {"model_type": "ernie4_5_vl_moe_text", "moe_intermediate_size": [24, 8], "moe_num_experts": 5, "moe_k": 2}
    config = {key: value for key, value in GROUPED.items() if key != "num_experts_per_tok"}
    loaded = read({"model_type": "ernie4_5_vl_moe", "text_config": config | text})
    assert "experts for images are not counted: tokens of text do not use them" in loaded.notes
    moe = MoE(experts=5, top_k=2, intermediate_size=24, shared_intermediate_size=48, router_bias=True)
    assert [layer.ffn for layer in layers(loaded.spec)] == [MLP(intermediate_size=80), *[moe] * 5]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "mimo_v2_flash",
            {"n_shared_experts": 1},
            "n_shared_experts 1 is not supported: no published MiMo-V2 has them",
        ),
        (
            "mimo_v2_flash",
            {"hybrid_layer_pattern": [2] * 6},
            "hybrid_layer_pattern must have 0 or 1 for each of 6 layers",
        ),
        (
            "mimo_v2_flash",
            {"sliding_window": None},
            "sliding_window is null, and there are layers of sliding_attention",
        ),
        ("solar_open", {"use_qk_norm": True}, "use_qk_norm true is not supported: transformers' solar_open has none"),
        ("laguna", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must say dense or sparse for each of 6 layers"),
        ("afmoe", {"layer_types": [CHUNKED] * 6}, "layer_types[0] 'chunked_attention' is not supported for afmoe"),
        ("olmoe", {"sliding_window": 9}, "sliding_window 9 is not known for olmoe, and it may change the count"),
        ("granitemoe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts"),
    ],
)
def test_refusals(read: Read, family: str, settings: Settings, message: str) -> None:
    refused(read, {"model_type": family} | GROUPED | settings, message)


@pytest.mark.parametrize("family", ["glm4v_moe", "qwen3_vl_moe"])
def test_text_decoders_in_wrappers(read: Read, family: str) -> None:
    loaded = read({"model_type": family, "text_config": {key: GROUPED[key] for key in GROUPED}})
    assert loaded.notes[0] == f"{family}: the text decoder alone is counted, other towers and projectors are not"
    assert sparse(loaded.spec) == [family != "glm4v_moe", *[True] * 5]
