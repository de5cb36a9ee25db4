"""Effective configuration: what the readers make of config.json files written by hand, family by family."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from powerplan.accounting import Accounting
from powerplan.ffn import MLP, MoE
from powerplan.load import LoadedModel
from powerplan.mixers import Attention
from powerplan.spec import Layer, ModelSpec, Norm

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
FULL, SLIDING = "full_attention", "sliding_attention"


def spec_of(read: Read, family: str, **settings: Any) -> ModelSpec:
    sizes = GROUPED if family != "gpt2" else {"vocab_size": 97, "n_embd": 48, "n_layer": 4, "n_head": 6}
    return read({"model_type": family} | sizes | settings).spec


def layers(spec: ModelSpec) -> list[Layer]:
    return [layer for group in spec.layers for _ in range(group.repeat) for layer in group.period]


def mixers(spec: ModelSpec) -> list[Attention]:
    softmax = []
    for layer in layers(spec):
        assert isinstance(layer.mixer, Attention)
        softmax.append(layer.mixer)
    return softmax


def windows(spec: ModelSpec) -> list[int | None]:
    return [mixer.window for mixer in mixers(spec)]


PUBLISHED: list[tuple[int, Settings]] = [
    (124_439_808, {"model_type": "gpt2", "vocab_size": 50_257, "n_embd": 768, "n_layer": 12, "n_head": 12}),
    (
        494_032_768,
        {
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    (
        30_532_122_624,
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
    (
        3_880_263_168,
        {
            "model_type": "gemma3",
            "text_config": {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34},
        },
    ),
    (
        20_914_757_184,
        {
            "model_type": "gpt_oss",
            "vocab_size": 201_088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_local_experts": 32,
        },
    ),
    (
        15_706_484_224,
        {
            "model_type": "deepseek_v2",
            "vocab_size": 102_400,
            "hidden_size": 2048,
            "intermediate_size": 10_944,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "q_lora_rank": None,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
        },
    ),
]
"""What transformers builds of these published sizes has so many parameters (of Gemma 3 4B the text decoder)."""


@pytest.mark.parametrize(("count", "config"), PUBLISHED, ids=[str(config["model_type"]) for _, config in PUBLISHED])
def test_published_counts(read: Read, count: int, config: Settings) -> None:
    assert Accounting(read(config).spec).total_parameters.with_embeddings == count


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sliding_window": 9, "max_window_layers": 0}, [None] * 4),
        ({"sliding_window": 9, "max_window_layers": 0, "use_sliding_window": False}, [None] * 4),
        ({"sliding_window": 9, "max_window_layers": 3, "use_sliding_window": True}, [None, None, None, 9]),
        ({"sliding_window": 9, "max_window_layers": 0, "use_sliding_window": True}, [9] * 4),
        ({"sliding_window": 9, "max_window_layers": 4, "use_sliding_window": True}, [None] * 4),
        ({"sliding_window": 9, "use_sliding_window": True}, [None] * 4),
        ({"sliding_window": None, "max_window_layers": 0, "use_sliding_window": True}, [None] * 4),
        ({"max_window_layers": 2, "use_sliding_window": True}, [None, None, 4096, 4096]),
        (
            {"sliding_window": 9, "use_sliding_window": True, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
            [9, None, None, 9],
        ),
        ({"layer_types": [FULL] * 4}, [None] * 4),
        ({"use_sliding_window": True, "num_hidden_layers": 30}, [None] * 28 + [4096] * 2),
    ],
)
def test_qwen_windows(read: Read, family: str, settings: Settings, expected: list[int | None]) -> None:
    assert windows(spec_of(read, family, **settings)) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 9}, [None] * 4),
        ({"use_sliding_window": True}, [4096] * 4),
        ({"sliding_window": 9, "use_sliding_window": True}, [9] * 4),
        ({"sliding_window": None, "use_sliding_window": True}, [None] * 4),
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, [None, None, 9, 9]),
    ],
)
def test_qwen3_moe_windows(read: Read, settings: Settings, expected: list[int | None]) -> None:
    assert windows(spec_of(read, "qwen3_moe", **settings)) == expected


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {"sliding_window": 9}, [None] * 4),
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("mistral", {"sliding_window": 9}, [9] * 4),
        ("mixtral", {}, [None] * 4),
        ("mixtral", {"sliding_window": 9}, [9] * 4),
        ("starcoder2", {}, [None] * 4),
        ("starcoder2", {"sliding_window": 9}, [9] * 4),
        ("olmo2", {"sliding_window": 9}, [None] * 4),
        ("gemma2", {}, [4096, None, 4096, None]),
        ("gemma2", {"sliding_window": 9, "layer_types": [FULL, FULL, SLIDING, FULL]}, [None, None, 9, None]),
        ("gemma3_text", {"sliding_window": 9}, [9] * 4),
        ("gemma3_text", {"sliding_window": 9, "num_hidden_layers": 7}, [9, 9, 9, 9, 9, None, 9]),
        ("gemma3_text", {"sliding_window": 9, "sliding_window_pattern": 3}, [9, 9, None, 9]),
        ("gemma3_text", {"sliding_window": 9, "sliding_window_pattern": 2}, [9, None, 9, None]),
        ("gemma3_text", {"sliding_window": 9, "_sliding_window_pattern": 2}, [9] * 4),
        ("gemma3_text", {"sliding_window": 9, "sliding_window_pattern": 1}, [None] * 4),
        (
            "gemma3_text",
            {"sliding_window": 9, "sliding_window_pattern": 2, "layer_types": [FULL, SLIDING, SLIDING, SLIDING]},
            [None, 9, 9, 9],
        ),
        ("gpt_oss", {}, [128, None, 128, None]),
        ("gpt_oss", {"sliding_window": 9, "layer_types": [FULL, SLIDING, FULL, FULL]}, [None, 9, None, None]),
    ],
)
def test_windows(read: Read, family: str, settings: Settings, expected: list[int | None]) -> None:
    assert windows(spec_of(read, family, **settings)) == expected


@pytest.mark.parametrize(
    ("family", "absent"),
    [
        ("llama", 64),
        ("olmo2", 64),
        ("mistral", 8),
        ("mixtral", 8),
        ("qwen2", 32),
        ("qwen3", 32),
        ("qwen3_moe", 4),
        ("gemma2", 4),
        ("gemma3_text", 4),
        ("gpt_oss", 8),
        ("starcoder2", 2),
    ],
)
def test_kv_heads_null_and_absent(read: Read, family: str, absent: int) -> None:
    settings = {"model_type": family} | GROUPED | {"num_attention_heads": 64, "hidden_size": 128}
    assert mixers(read(settings | {"num_key_value_heads": None}).spec)[0].kv_heads == 64
    del settings["num_key_value_heads"]
    assert mixers(read(settings).spec)[0].kv_heads == absent


@pytest.mark.parametrize(
    ("family", "stated", "expected"),
    [
        ("llama", {}, 8),
        ("llama", {"head_dim": 20}, 20),
        ("llama", {"head_dim": None}, 8),
        ("mistral", {"head_dim": 20, "hidden_size": 50}, 20),
        ("qwen3", {}, 128),
        ("qwen3_moe", {}, 8),
        ("gemma2", {}, 256),
        ("gemma3_text", {}, 256),
        ("gpt_oss", {}, 64),
        ("gpt_oss", {"head_dim": None}, 8),
    ],
)
def test_head_dim(read: Read, family: str, stated: Settings, expected: int) -> None:
    settings = stated | ({"num_key_value_heads": 2, "num_local_experts": 4} if family == "gpt_oss" else {})
    assert {mixer.head_dim for mixer in mixers(spec_of(read, family, **settings))} == {expected}


@pytest.mark.parametrize(
    ("family", "stated", "attention", "mlp"),
    [
        ("llama", {}, False, False),
        ("llama", {"attention_bias": True}, True, False),
        ("llama", {"mlp_bias": True}, False, True),
        ("mistral", {"attention_bias": False}, False, False),
        ("qwen2", {"attention_bias": False}, "qkv", False),
        ("qwen3", {"attention_bias": True}, True, False),
        ("gemma2", {"attention_bias": True}, True, False),
        ("gemma3_text", {"attention_bias": True}, True, False),
        ("olmo2", {"attention_bias": True}, True, False),
        ("starcoder2", {}, True, True),
        ("starcoder2", {"use_bias": False}, False, False),
        ("gpt_oss", {}, True, True),
        ("gpt_oss", {"attention_bias": False}, False, True),
    ],
)
def test_biases(read: Read, family: str, stated: Settings, attention: bool | str, mlp: bool) -> None:
    (layer,) = {*layers(spec_of(read, family, layer_types=[FULL] * 4, **stated))}
    assert isinstance(layer.mixer, Attention)
    assert layer.mixer.bias == attention
    assert isinstance(layer.ffn, (MLP, MoE))
    assert layer.ffn.bias is mlp


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("gemma2", True),
        ("gemma3_text", True),
        ("gpt2", True),
        ("starcoder2", True),
        ("deepseek_v3", False),
        ("gpt_oss", False),
        ("llama", False),
        ("mistral", False),
        ("mixtral", False),
        ("olmo2", False),
        ("qwen2", False),
        ("qwen3", False),
        ("qwen3_moe", False),
    ],
)
def test_ties(read: Read, family: str, tied: bool) -> None:
    assert spec_of(read, family).tie_embeddings is tied
    assert spec_of(read, family, tie_word_embeddings=None).tie_embeddings is tied
    assert spec_of(read, family, tie_word_embeddings=not tied).tie_embeddings is not tied


@pytest.mark.parametrize(
    ("family", "norm", "qk_norm"),
    [
        ("llama", Norm(), "none"),
        ("qwen3", Norm(), "head"),
        ("qwen3_moe", Norm(), "head"),
        ("olmo2", Norm(), "full"),
        ("gemma2", Norm(per_layer=4), "none"),
        ("gemma3_text", Norm(per_layer=4), "head"),
        ("starcoder2", Norm(kind="layernorm"), "none"),
        ("gpt2", Norm(kind="layernorm"), "none"),
    ],
)
def test_norms(read: Read, family: str, norm: Norm, qk_norm: str) -> None:
    spec = spec_of(read, family)
    assert spec.norm == norm
    assert {mixer.qk_norm for mixer in mixers(spec)} == {qk_norm}


def test_gpt2(read: Read) -> None:
    config = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 6}
    spec = read(config).spec
    assert spec.position_embeddings == 1024
    assert {*layers(spec)} == {
        Layer(mixer=Attention(heads=6, head_dim=8, bias=True), ffn=MLP(intermediate_size=192, gated=False, bias=True))
    }
    assert read(config | {"n_inner": None}).spec == spec
    assert layers(read(config | {"n_inner": 100, "n_positions": 64}).spec)[0].ffn == MLP(
        intermediate_size=100, gated=False, bias=True
    )
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        assert read(config | {key: 64}).spec.position_embeddings == 64


@pytest.mark.parametrize(
    ("family", "stated", "expected", "note"),
    [
        (
            "llama",
            {"sliding_window": 9, "layer_types": [FULL, SLIDING] * 2},
            [None, 9] * 2,
            "windows follow layer_types",
        ),
        (
            "mistral",
            {"sliding_window": 9, "layer_types": [FULL, SLIDING] * 2},
            [None, 9] * 2,
            "transformers' mistral code does not look",
        ),
        ("mistral", {"sliding_window": 9, "layer_types": [SLIDING] * 4}, [9] * 4, None),
        (
            "qwen3_moe",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
            [None, None, 9, 9],
            "transformers' qwen3_moe code looks at neither",
        ),
        ("qwen3_moe", {"sliding_window": 9, "use_sliding_window": True}, [9] * 4, None),
    ],
)
def test_windows_that_transformers_would_not_apply_are_remarked_upon(
    read: Read, family: str, stated: Settings, expected: list[int | None], note: str | None
) -> None:
    loaded = read({"model_type": family} | GROUPED | stated)
    assert windows(loaded.spec) == expected
    if note is None:
        assert loaded.notes == ()
    else:
        assert re.search(note, "\n".join(loaded.notes))
