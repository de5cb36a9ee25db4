"""Effective configuration: experts, latent attention, nested text_config; and the names and notes of a reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from powerplan.ffn import MLP, MoE
from powerplan.load import LoadedModel, load_model
from powerplan.mixers import MLA, Attention
from powerplan.spec import Layer, ModelSpec

Settings = dict[str, Any]
Read = Callable[[Settings], LoadedModel]

GROUPED: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LATENT = GROUPED | {"n_routed_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3, "n_shared_experts": 2}
DENSE = MLP(intermediate_size=80)
DEEPSEEK = ["deepseek_v2", "deepseek_v3", "kimi_k2"]


def layers(spec: ModelSpec) -> list[Layer]:
    return [layer for group in spec.layers for _ in range(group.repeat) for layer in group.period]


def dense_layers(spec: ModelSpec) -> list[int]:
    return [index for index, layer in enumerate(layers(spec)) if layer.ffn == DENSE]


def mixture(spec: ModelSpec) -> MoE:
    (moe,) = {layer.ffn for layer in layers(spec) if isinstance(layer.ffn, MoE)}
    return moe


def text_decoder(family: str) -> str:
    return f"{family}: the text decoder alone is counted, other towers and projectors are not"


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("mixtral", {}, MoE(experts=8, top_k=2, intermediate_size=80)),
        (
            "mixtral",
            {"num_local_experts": 3, "num_experts_per_tok": 1},
            MoE(experts=3, top_k=1, intermediate_size=80),
        ),
        ("mixtral", {"num_experts": 5}, MoE(experts=5, top_k=2, intermediate_size=80)),
        ("qwen3_moe", {}, MoE(experts=128, top_k=8, intermediate_size=768)),
        (
            "qwen3_moe",
            {"num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
            MoE(experts=6, top_k=2, intermediate_size=24),
        ),
        ("gpt_oss", {}, MoE(experts=128, top_k=4, intermediate_size=80, bias=True, router_bias=True)),
        (
            "gpt_oss",
            {"num_experts": 9, "experts_per_token": 5},
            MoE(experts=9, top_k=5, intermediate_size=80, bias=True, router_bias=True),
        ),
        (
            "gpt_oss",
            {"num_local_experts": 9, "experts_per_token": 5, "num_experts_per_tok": 3},
            MoE(experts=9, top_k=3, intermediate_size=80, bias=True, router_bias=True),
        ),
    ],
)
def test_experts(read: Read, family: str, settings: Settings, expected: MoE) -> None:
    spec = read({"model_type": family} | GROUPED | settings).spec
    assert {layer.ffn for layer in layers(spec)} == {expected}


def test_gpt_oss_has_sinks(read: Read) -> None:
    spec = read({"model_type": "gpt_oss"} | GROUPED).spec
    assert all(isinstance(layer.mixer, Attention) and layer.mixer.sinks for layer in layers(spec))


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({}, []),
        ({"mlp_only_layers": None}, []),
        ({"mlp_only_layers": [0, 3]}, [0, 3]),
        ({"mlp_only_layers": [0, 1, 2, 3]}, [0, 1, 2, 3]),
        ({"mlp_only_layers": [9]}, []),
        ({"decoder_sparse_step": 2}, [0, 2]),
        ({"decoder_sparse_step": 3}, [0, 1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 1, 2]),
        ({"num_experts": 0}, [0, 1, 2, 3]),
    ],
)
def test_qwen3_moe_dense_layers(read: Read, settings: Settings, dense: list[int]) -> None:
    assert dense_layers(read({"model_type": "qwen3_moe"} | GROUPED | settings).spec) == dense


@pytest.mark.parametrize("family", DEEPSEEK)
@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"first_k_dense_replace": 0}, []),
        ({"first_k_dense_replace": 1}, [0]),
        ({"first_k_dense_replace": 4}, [0, 1, 2, 3]),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [0, 1, 3]),
        ({"first_k_dense_replace": 0, "n_routed_experts": None}, [0, 1, 2, 3]),
    ],
)
def test_deepseek_dense_layers(read: Read, family: str, settings: Settings, dense: list[int]) -> None:
    assert dense_layers(read({"model_type": family} | LATENT | settings).spec) == dense


@pytest.mark.parametrize(("family", "first"), [("deepseek_v2", 0), ("deepseek_v3", 3), ("kimi_k2", 3)])
def test_deepseek_defaults(read: Read, family: str, first: int) -> None:
    spec = read({"model_type": family, "num_experts_per_tok": 6} | GROUPED).spec
    assert dense_layers(spec) == list(range(first))
    assert layers(spec)[0].mixer == MLA(
        heads=6, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    experts, width, shared = (64, 1407, 2) if family == "deepseek_v2" else (256, 2048, 1)
    assert mixture(spec) == MoE(
        experts=experts,
        top_k=6,
        intermediate_size=width,
        shared_intermediate_size=shared * width,
        router_bias=family != "deepseek_v2",
    )


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2"])
def test_deepseek_v3_experts_by_other_names(read: Read, family: str) -> None:
    config = {"model_type": family, "first_k_dense_replace": 0, "num_local_experts": 12} | GROUPED
    assert (mixture(read(config).spec).experts, mixture(read(config).spec).top_k) == (12, 8)


@pytest.mark.parametrize(
    ("family", "stated", "counted"),
    [
        ("deepseek_v2", {}, False),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, False),
        ("deepseek_v3", {}, True),
        ("deepseek_v3", {"topk_method": None}, True),
        ("deepseek_v3", {"topk_method": "noaux_tc"}, True),
        ("deepseek_v3", {"topk_method": "greedy"}, False),
        ("kimi_k2", {"topk_method": "noaux_tc"}, True),
    ],
)
def test_correction_bias_follows_topk_method(read: Read, family: str, stated: Settings, counted: bool) -> None:
    spec = read({"model_type": family} | LATENT | {"first_k_dense_replace": 1} | stated).spec
    assert mixture(spec).router_bias is counted


@pytest.mark.parametrize("family", DEEPSEEK)
def test_latent_attention(read: Read, family: str) -> None:
    ranks: Settings = {"kv_lora_rank": 28, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10}
    config = {"model_type": family} | LATENT | ranks
    spec = read(config | {"q_lora_rank": None, "attention_bias": True}).spec
    assert {layer.mixer for layer in layers(spec)} == {MLA(heads=6, q_lora_rank=None, bias=True, **ranks)}
    spec = read(config | {"q_lora_rank": 20}).spec
    assert {layer.mixer for layer in layers(spec)} == {MLA(heads=6, q_lora_rank=20, **ranks)}


@pytest.mark.parametrize("stated", [0, None])
def test_no_shared_experts(read: Read, stated: int | None) -> None:
    spec = read({"model_type": "deepseek_v3"} | LATENT | {"n_shared_experts": stated, "first_k_dense_replace": 0}).spec
    assert mixture(spec).shared_intermediate_size == 0


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_note_on_multi_token_prediction(read: Read, key: str) -> None:
    config = {"model_type": "deepseek_v3"} | LATENT
    loaded = read(config | {key: 1})
    assert loaded.notes == ("multi-token-prediction layers (num_nextn_predict_layers) are not counted",)
    assert loaded.spec == read(config).spec
    for none in (0, None):
        assert read(config | {key: none}).notes == ()


def test_text_config_with_every_default_left_out(read: Read) -> None:
    loaded = read({"model_type": "gemma3", "text_config": {}})
    spec = loaded.spec
    assert (spec.vocab_size, spec.hidden_size, spec.layer_count) == (262_208, 2304, 26)
    assert spec.tie_embeddings is True
    period = layers(spec)[:6]
    assert [layer.mixer.window for layer in period if isinstance(layer.mixer, Attention)] == [4096] * 5 + [None]
    assert period[5] == Layer(
        mixer=Attention(heads=8, kv_heads=4, head_dim=256, qk_norm="head"), ffn=MLP(intermediate_size=9216)
    )
    left_out = (
        "hidden_size 2,304, num_hidden_layers 26, num_attention_heads 8, vocab_size 262,208, intermediate_size 9,216"
    )
    sizes = f"text_config leaves out sizes, which are transformers' defaults of gemma3_text: {left_out}"
    assert loaded.notes == (text_decoder("gemma3"), sizes)


@pytest.mark.parametrize(
    ("wrapper", "inner", "as_if"),
    [
        ("gemma3", {}, "gemma3_text"),
        ("gemma3", {"model_type": "gemma3_text"}, "gemma3_text"),
        ("mistral3", {"model_type": "mistral"}, "mistral"),
        ("kimi_k25", {}, "kimi_k2"),
        ("kimi_k25", {"model_type": "deepseek_v3"}, "deepseek_v3"),
    ],
)
def test_text_config_is_read_as_its_family(read: Read, wrapper: str, inner: Settings, as_if: str) -> None:
    loaded = read({"model_type": wrapper, "text_config": GROUPED | inner})
    assert loaded.spec == read({"model_type": as_if} | GROUPED).spec
    assert loaded.notes == (text_decoder(wrapper),)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [
        ({"tie_word_embeddings": False}, {}, False),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, False),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True),
        ({"tie_word_embeddings": None}, {"tie_word_embeddings": False}, False),
        ({}, {}, True),
    ],
)
def test_wrapper_decides_on_the_tie(read: Read, outer: Settings, inner: Settings, tied: bool) -> None:
    assert read({"model_type": "gemma3", "text_config": inner} | outer).spec.tie_embeddings is tied


def test_family_of_its_own_is_not_read_through_text_config(read: Read) -> None:
    loaded = read({"model_type": "llama", "text_config": {"model_type": "gpt2"}} | GROUPED)
    assert loaded.spec == read({"model_type": "llama"} | GROUPED).spec
    assert loaded.notes == ()


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("models\\local\\mine", "mine"),
        (" org/name/ ", "name"),
        ("", "folder-of-it"),
        ("/", "folder-of-it"),
        (None, "folder-of-it"),
        (7, "folder-of-it"),
        (300 * "n", 200 * "n"),
    ],
)
def test_name(tmp_path: Path, stated: Any, expected: str) -> None:
    folder = tmp_path / "folder-of-it"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": stated} | GROUPED))
    assert load_model(folder).spec.name == load_model(folder / "config.json").spec.name == expected


def test_name_of_another_file_is_its_stem(tmp_path: Path) -> None:
    for stem in ("mine-7b", 240 * "n"):
        path = tmp_path / f"{stem}.json"
        path.write_text(json.dumps({"model_type": "llama"} | GROUPED))
        assert load_model(path).spec.name == stem[:200]


@pytest.mark.parametrize(
    ("architectures", "named"),
    [
        (["LlamaForCausalLM"], None),
        (["GPT2LMHeadModel"], None),
        (["Gemma3ForConditionalGeneration"], None),
        ([], None),
        (None, None),
        ("LlamaForSequenceClassification", None),
        ([3], None),
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (["LlamaModel", "LlamaModel"], "LlamaModel"),
    ],
)
def test_note_on_another_head(read: Read, architectures: Any, named: str | None) -> None:
    loaded = read({"model_type": "llama", "architectures": architectures} | GROUPED)
    note = f"architectures names {named!r}; it is counted as a language model, with its LM head"
    assert loaded.notes == (() if named is None else (note,))
