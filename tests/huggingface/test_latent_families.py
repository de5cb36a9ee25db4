"""Families with latent or compressed attention and experts: layers, spellings of keys, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hf_decoders import require, stored_elements
from hf_meta import on_meta
from msgspec.structs import replace

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.extras import Extra
from powerplan.ffn import MLP, MoE
from powerplan.load import LoadedModel
from powerplan.mixers import DSA, MLA, Attention, Compressed
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
LATENT: Settings = GROUPED | {
    "moe_intermediate_size": 24,
    "n_routed_experts": 5,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def layers(spec: ModelSpec) -> list[Layer]:
    return [layer for group in spec.layers for layer in group.period * group.repeat]


def refused(read: Read, config: Settings, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(config)


def test_deepseek_v2_without_latent_attention(read: Read) -> None:
    """DeepSeek-VL2-Tiny: use_mla false is the attention of Llama; a latent of null alone is refused."""
    config = {
        "model_type": "deepseek_v2",
        "use_mla": False,
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "moe_intermediate_size": 896,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "kv_lora_rank": None,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "vocab_size": 129_280,
    }
    spec = read(config).spec
    assert {layer.mixer for layer in layers(spec)} == {Attention(heads=10, head_dim=128)}
    attention, expert = 4 * 1280**2, 3 * 1280 * 896
    body = 12 * (attention + 2 * 1280) + 3 * 1280 * 6848 + 11 * (66 * expert + 64 * 1280)
    assert Accounting(spec).total_parameters.with_embeddings == body + 2 * 129_280 * 1280 + 1280
    message = "kv_lora_rank is null: without a latent, this is another attention"
    refused(read, {key: value for key, value in config.items() if key != "use_mla"}, message)


def test_biases_of_deepseek_v2(read: Read) -> None:
    """mlp_bias is on dense MLPs and shared experts."""
    config = LATENT | {"model_type": "deepseek_v2", "mlp_bias": True, "first_k_dense_replace": 1}
    dense, sparse = layers(read(config).spec)[:2]
    assert dense.ffn == MLP(intermediate_size=80, bias=True)
    assert sparse.extras == (Extra(name="shared expert biases", vectors=1, elements=2 * 2 * 24),)


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("glm_moe_dsa", {}, "FFFFFF"),
        ("glm_moe_dsa", {"index_topk_freq": 2}, "FFSFSF"),
        ("glm_moe_dsa", {"index_topk_freq": 2, "index_skip_topk_offset": 1}, "FSFSFS"),
        ("glm_moe_dsa", {"index_topk_pattern": "FSSFSS"}, "FSSFSS"),
        ("glm_moe_dsa", {"indexer_types": ["full", "full", *["shared"] * 4]}, "FFSSSS"),
        ("hy_v4", {}, "FFSSSF"),
        ("deepseek_v32", {}, "FFFFFF"),
    ],
)
def test_layers_with_an_indexer(read: Read, family: str, settings: Settings, expected: str) -> None:
    mixers = [layer.mixer for layer in layers(read({"model_type": family} | LATENT | settings).spec)]
    assert all(isinstance(mixer, DSA) for mixer in mixers)
    assert "".join("S" if isinstance(mixer, DSA) and mixer.shared_index else "F" for mixer in mixers) == expected


@pytest.mark.parametrize(
    "settings",
    [{"indexer_types": ["shared"] * 6}, {"indexer_types": ["full"] * 5}, {"indexer_types": ["full", "none"] * 3}],
)
def test_indexers_that_cannot_be(read: Read, settings: Settings) -> None:
    message = "indexer_types must say full or shared for each of 6 layers, and begin with full"
    refused(read, {"model_type": "glm_moe_dsa"} | LATENT | settings, message)


def test_longcat_layers(read: Read) -> None:
    """A layer of LongCat-Flash: MLA and an MLP, twice, and experts beside them; some choices compute nothing."""
    config = {key: value for key, value in LATENT.items() if key not in ("num_hidden_layers", "num_key_value_heads")}
    sizes = {"num_layers": 2, "zero_expert_num": 3, "moe_topk": 4, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 80}
    renamed = {key: config[key] for key in config.keys() - {"intermediate_size", "moe_intermediate_size"}}
    del renamed["num_experts_per_tok"]
    first, experts, second, *others = layers(read({"model_type": "longcat_flash"} | renamed | sizes).spec)
    assert first == second == Layer(mixer=first.mixer, ffn=MLP(intermediate_size=80))
    assert isinstance(first.mixer, MLA)
    moe = MoE(experts=5, top_k=4, intermediate_size=24, zero_experts=3, router_bias=True)
    assert experts == Layer(ffn=moe, norms=0)
    assert others == [first, experts, second]


def test_deepseek_v4_by_the_original_keys(read: Read) -> None:
    """compress_ratios of the original files, one more for the prediction layer, and compress rates of any size."""
    config = {
        "model_type": "deepseek_v4",
        "compress_ratios": [0, 4, 128, 4, 128, 0, 0],
        "compress_rate_hca": 64,
        "head_dim": 8,
        "index_head_dim": 4,
        "index_n_heads": 2,
        "index_topk": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 5,
        "num_hash_layers": 2,
        "o_groups": 2,
        "o_lora_rank": 12,
        "q_lora_rank": 20,
    } | {key: value for key, value in GROUPED.items() if key != "intermediate_size"}
    spec = read(config).spec
    alone = Compressed(heads=6, head_dim=8, q_lora_rank=20, output_groups=2, output_rank=12, compress_rate=None)
    picks = replace(alone, compress_rate=4, index_heads=2, index_head_dim=4, top_k=16)
    every = replace(alone, compress_rate=64)
    assert [layer.mixer for layer in layers(spec)] == [alone, picks, every, picks, every, alone]
    router = [layer.ffn.router_bias for layer in layers(spec) if isinstance(layer.ffn, MoE)]
    assert router == [False, False, True, True, True, True]
    streams = 4
    rows = (2 + streams) * streams
    layer_extras = layers(spec)[0].extras
    assert [(extra.vectors, extra.elements) for extra in layer_extras] == [(2 * rows * streams, 0), (0, 2 * rows + 6)]
    assert [(extra.vectors, extra.elements) for extra in spec.extras] == [(streams**2, 0), (0, streams + 1)]
    typed = {"layer_types": ["sliding_attention"] * 5 + ["compressed_sparse_attention"]}
    assert [layer.mixer for layer in layers(read(config | typed).spec)] == [*[alone] * 5, picks]
    ratios = "compress_ratios must have 0, 4 or 128 for each of 6 layers"
    refused(read, config | {"compress_ratios": [4] * 5}, ratios)
    refused(read, config | {"compress_ratios": [4] * 5 + [8]}, ratios)
    refused(read, config | {"n_shared_experts": 2}, "n_shared_experts is not 1, and transformers' deepseek_v4 has one")
    refused(read, config | {"mlp_layer_types": ["dense"] * 6}, "mlp_layer_types must say hash_moe or moe for each of 6")


def test_the_connections_before_the_head_are_no_part_of_it(read: Read) -> None:
    """By layer, FLOPs of the whole model have a row for each name."""
    accounting = Accounting(read({"model_type": "hy_v4", "hc_mult": 3} | LATENT).spec)
    whole = {part.name: part.weight_flops_per_token for part in accounting.layers(64) if part.use is None}
    assert whole == {"hyper-connections": 2 * 9 * 48, "lm head": 2 * 97 * 48}
    assert sum(part.weight_flops_per_token for part in accounting.layers(64)) == accounting.weight_flops_per_token


@pytest.mark.transformers
@pytest.mark.parametrize("tied", [False, True])
def test_text_decoder_of_hy_v4_vl(transformers: Any, torch: Any, read: Read, tied: bool) -> None:
    """It has no causal language model of its own: the decoder of the wrapper, and the wrapper's LM head."""
    require(transformers, "hy_v4_vl")
    text = LATENT | {"num_key_value_heads": 6, "num_attention_heads": 6, "hc_mult": 3, "tie_word_embeddings": tied}
    text |= {
        "pad_token_id": 0,
        "qk_rope_head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "out_hidden_size": 48}
    config = transformers.HYV4VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with on_meta():
        model = transformers.HYV4VLForConditionalGeneration(config)
    head = 0 if tied else model.lm_head.weight.numel()
    for file in (config.to_json_string(use_diff=False), config.to_json_string(use_diff=True)):
        counted = Accounting(read(json.loads(file)).spec).total_parameters.with_embeddings
        assert counted == stored_elements(model.model.language_model) + head
