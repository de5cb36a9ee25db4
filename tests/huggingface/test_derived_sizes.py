"""Sizes that follow from others: read where a family's code reads them, and refused where they contradict."""

from __future__ import annotations

from typing import Any

import pytest
from hf_decoders import Settings, mixers_by_layer
from hf_files import default_file, read

from powerplan.errors import InputError
from powerplan.mixers import KDA, MLA, Attention, GatedDeltaNet


def file(name: str, **settings: object) -> Settings:
    return default_file(name) | settings


def mixers(data: Settings) -> list[Any]:
    """Return the mixers of a file by layer."""
    return mixers_by_layer(read(data)[0])


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3", "gemma2", "lfm3"])
def test_head_dim_null(name: str) -> None:
    """hidden_size / num_attention_heads, whatever head_dim the class has as default."""
    data = file(name, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=None)
    assert {mixer.head_dim for mixer in mixers(data) if isinstance(mixer, Attention)} == {8}


def test_linear_sizes_of_bailing_hybrid() -> None:
    sizes = {"linear_num_heads": 3, "linear_head_dim": 20, "linear_conv_kernel_dim": 7}
    data = file("bailing_hybrid", num_hidden_layers=2, head_dim=12, short_conv_kernel_size=5, num_attention_heads=4)
    (stated, *_), (derived, *_) = mixers(data | sizes), mixers(data)
    assert isinstance(stated, KDA)
    assert isinstance(derived, KDA)
    assert (stated.heads, stated.head_dim, stated.conv_size) == (3, 20, 7)
    assert (derived.heads, derived.head_dim, derived.conv_size) == (4, 12, 5)


def test_head_dim_of_recurrent_gemma() -> None:
    data = file("recurrent_gemma", hidden_size=48, lru_width=48, num_attention_heads=6, num_hidden_layers=3)
    assert [mixers(data | {"head_dim": dim})[2].head_dim for dim in (20, None)] == [20, 8]


def test_layers_of_gemma4_without_sizes_of_their_own() -> None:
    """per_layer_config null means none, and a file without it means global_head_dim."""
    data = file("gemma4_text", num_hidden_layers=6, head_dim=24)
    assert [mixers(data)[index].head_dim for index in (0, 5)] == [24, 512]
    assert [mixers(data | {"per_layer_config": None})[index].head_dim for index in (0, 5)] == [24, 24]


def test_head_dims_of_olmo_hybrid() -> None:
    """Those left out follow from the width: 0.75 hidden_size / heads for keys, and twice that for values."""
    data = file("olmo_hybrid", hidden_size=48, num_attention_heads=6, num_key_value_heads=6, num_hidden_layers=4)
    delta = mixers(data)[0]
    assert isinstance(delta, GatedDeltaNet)
    assert (delta.heads, delta.head_dim, delta.v_head_dim) == (6, 6, 12)
    stated = mixers(data | {"linear_key_head_dim": 10, "linear_value_head_dim": 14})[0]
    assert isinstance(stated, GatedDeltaNet)
    assert (stated.head_dim, stated.v_head_dim) == (10, 14)


def test_head_dim_of_values_in_minicpm3() -> None:
    data = file("minicpm3", hidden_size=48, num_attention_heads=6, num_hidden_layers=1)
    for stated, expected in (({}, 8), ({"v_head_dim": None}, 8), ({"v_head_dim": 20}, 20)):
        (latent,) = mixers(data | stated)
        assert isinstance(latent, MLA)
        assert latent.v_head_dim == expected


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("xlstm", {"embedding_dim": 64}, "embedding_dim is 64, and hidden_size makes it 4,096"),
        ("xlstm", {"num_blocks": 3}, "num_blocks is 3, and num_hidden_layers makes it 32"),
        ("xlstm", {"add_out_norm": False}, "add_out_norm false is not supported"),
        ("zamba", {"attention_hidden_size": 64}, "attention_hidden_size is 64, and hidden_size makes it 7,424"),
        ("zamba2", {"attention_hidden_size": 64}, "attention_hidden_size is 64, and hidden_size makes it 5,120"),
        (
            "zamba2",
            {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [0]},
            "hybrid_layer_ids is [0], and layers_block_type makes it [1]",
        ),
        (
            "longcat_flash",
            {"qk_head_dim": 64},
            "qk_head_dim is 64, and qk_nope_head_dim + qk_rope_head_dim makes it 192",
        ),
        ("qwen3_5_moe_text", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported: every layer"),
        ("qwen3_5_moe_text", {"mlp_only_layers": [0]}, "mlp_only_layers [0] is not supported: every layer"),
        ("gemma4_unified_text", {"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input 8 is not known"),
        ("gemma4_unified_text", {"enable_moe_block": True}, "enable_moe_block true is not known"),
        ("bamba", {"mamba_d_ssm": 64}, "mamba_d_ssm 64 is not known for bamba"),
        ("granitemoehybrid", {"mamba_d_ssm": 64}, "mamba_d_ssm 64 is not known for granitemoehybrid"),
    ],
)
def test_contradictions(name: str, settings: Settings, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        read(file(name) | settings)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("config.json:")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("xlstm", {"embedding_dim": 4096, "num_blocks": 32}),
        ("zamba2", {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]}),
        ("qwen3_5_moe_text", {"decoder_sparse_step": 1, "mlp_only_layers": []}),
    ],
)
def test_agreement(name: str, settings: Settings) -> None:
    same = {key: value for key, value in settings.items() if key in ("num_hidden_layers", "layers_block_type")}
    assert read(file(name) | settings) == read(file(name) | same)
