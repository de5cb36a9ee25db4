"""Readers of families with recurrent states: flash-linear-attention, the original Mamba files, PowerCoder; refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.accounting import Accounting
from powerplan.documents import parse_json
from powerplan.errors import InputError
from powerplan.huggingface import FAMILIES, read_config
from powerplan.huggingface.fla import FAMILIES as FLA
from powerplan.load import LoadedModel, catalogue_spec
from powerplan.mixers import KDA, NSA, RWKV7, Attention, Mamba1, Mamba2, MoBA, Power
from powerplan.spec import Layer, ModelSpec

Settings = dict[str, Any]
Read = Callable[[Settings], LoadedModel]

COUNTS = json.loads((Path(__file__).parent.parent / "data" / "fla_parameter_counts.json").read_text(encoding="utf-8"))
KIMI_TYPES = {"full_attn_layers": [2, 5], "kda_layers": [1, 3, 4]}
KIMI: Settings = {
    "model_type": "kimi_linear",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "head_dim": 72,
    "linear_attn_config": KIMI_TYPES | {"num_heads": 3, "head_dim": 20, "short_conv_kernel_size": 4},
}
GROUPED: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
ORIGINAL: Settings = {
    "d_model": 768,
    "d_intermediate": 0,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
RWKV: Settings = {
    "model_type": "rwkv7",
    "vocab_size": 97,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "decay_low_rank_dim": 8,
    "a_low_rank_dim": 9,
    "gate_low_rank_dim": 10,
    "v_low_rank_dim": 11,
}
WIDTHS: Settings = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2}


def layers(spec: ModelSpec) -> list[Layer]:
    return [layer for group in spec.layers for _ in range(group.repeat) for layer in group.period]


def kinds(spec: ModelSpec) -> list[str]:
    return [layer.mixer.kind if layer.mixer else "none" for layer in layers(spec)]


@pytest.mark.parametrize("row", COUNTS["models"], ids=lambda row: f"{row['config']['model_type']}-{row['params']}")
def test_parameters_of_flash_linear_attention(read: Read, row: Settings) -> None:
    """Counts of the models that fla itself builds from the same settings: scripts/fla_counts.py."""
    spec = read(row["config"]).spec
    assert Accounting(spec).total_parameters.with_embeddings == row["params"]


def test_every_family_of_flash_linear_attention_is_counted() -> None:
    counted = [row["config"]["model_type"] for row in COUNTS["models"]]
    assert set(FLA) | {"mamba2"} == set(counted)
    assert all(counted.count(family) >= 4 for family in FLA)


def test_softmax_layers_of_a_hybrid(read: Read) -> None:
    attn = {"layers": [1], "num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "window_size": 64}
    spec = read(WIDTHS | {"model_type": "gla", "num_heads": 4, "attn": attn}).spec
    assert kinds(spec) == ["gla", "attention"]
    assert layers(spec)[1].mixer == Attention(heads=6, kv_heads=2, head_dim=8, bias="qkv", window=64)


def test_fla_files_of_sparse_attention(read: Read) -> None:
    spec = read(WIDTHS | {"model_type": "nsa", "num_heads": 16, "num_kv_heads": 1, "block_size": 32}).spec
    expected = NSA(
        heads=16, kv_heads=1, head_dim=32, compress_size=32, compress_stride=32, select_size=32, select_count=16
    )
    assert layers(spec)[0].mixer == expected
    moba = read(WIDTHS | {"model_type": "moba", "num_heads": 6, "moba_topk": 3}).spec
    assert layers(moba)[0].mixer == MoBA(heads=6, head_dim=8, block_size=256, top_k=3, output_norm=True)


def test_kimi_counts_layers_from_1_and_ignores_its_head_dim(read: Read) -> None:
    spec = read(KIMI).spec
    assert kinds(spec) == ["kda", "mla", "kda", "kda", "mla"]
    assert layers(spec)[0].mixer == KDA(heads=3, head_dim=20, gate_rank=20)
    assert read(KIMI | {"head_dim": 5}).spec == spec


def test_kimi_by_the_names_of_transformers(read: Read) -> None:
    types = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"]
    renamed = {"linear_num_heads": 3, "linear_head_dim": 20, "layer_types": types}
    config = {key: value for key, value in KIMI.items() if key != "linear_attn_config"}
    assert read(config | renamed).spec == read(KIMI).spec
    assert kinds(read(config).spec) == ["kda", "kda", "kda", "kda", "mla"]


def test_original_mamba_files(read: Read) -> None:
    spec = read(ORIGINAL).spec
    assert Accounting(spec).total_parameters.with_embeddings == 128_989_632
    assert (spec.vocab_size, spec.tie_embeddings) == (50_288, True)
    assert {layer.mixer for layer in layers(spec)} == {Mamba2(heads=24)}
    first = read(ORIGINAL | {"ssm_cfg": {}, "pad_vocab_size_multiple": 8}).spec
    assert {layer.mixer for layer in layers(first)} == {Mamba1(inner_size=1536, dt_rank=48)}
    assert Accounting(first).total_parameters.with_embeddings == 129_135_360  # transformers' mamba of these widths


def test_powercoder_is_the_catalogues(read: Read) -> None:
    config = {
        "model_type": "powercoder",
        "vocab_size": 49_152,
        "hidden_size": 3072,
        "intermediate_size": 12_288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
    }
    spec, listed = read(config).spec, catalogue_spec("power-coder-3b")
    assert spec.layers == listed.layers
    assert Accounting(spec).total_parameters == Accounting(listed).total_parameters
    mixer = layers(read(config | {"chunk_size": 64, "use_bias": False}).spec)[0].mixer
    assert mixer == Power(p=2, heads=24, kv_heads=2, head_dim=128, gated=True, chunk_size=64)


def test_rwkv7_has_no_value_residual_at_first(read: Read) -> None:
    first, second, third = layers(read(RWKV).spec)
    assert first.mixer == RWKV7(heads=2, decay_rank=8, rate_rank=9, gate_rank=10)
    assert second.mixer == third.mixer == RWKV7(heads=2, decay_rank=8, rate_rank=9, gate_rank=10, value_rank=11)
    assert read(RWKV).spec.norm.embedding
    wide = layers(read(RWKV | {"value_dim": [128, 256, 128]}).spec)
    assert [layer.mixer.v_head_dim for layer in wide if isinstance(layer.mixer, RWKV7)] == [64, 128, 64]


REFUSED: list[tuple[Settings, str]] = [
    (KIMI | {"linear_attn_config": 5}, "linear_attn_config must be an object, and is 5"),
    (
        KIMI | {"linear_attn_config": KIMI_TYPES | {"kda_layers": [0, 1, 3]}},
        "full_attn_layers and kda_layers must name each of layers 1 to 5 once",
    ),
    (
        {key: value for key, value in KIMI.items() if key != "linear_attn_config"} | {"layer_types": ["full"] * 5},
        "layer_types[0] 'full' is not supported for kimi_linear",
    ),
    (KIMI | {"mlp_layer_types": ["sparse"]}, "mlp_layer_types must say dense or sparse for each of 5 layers"),
    (
        GROUPED | {"model_type": "qwen3_next", "linear_num_key_heads": 5},
        "linear_num_key_heads 5 does not divide linear_num_value_heads 32",
    ),
    (GROUPED | {"model_type": "minimax_m1"}, "minimax_m1 needs attn_type_list, and the file has none"),
    (
        GROUPED | {"model_type": "minimax_text_01", "attn_type_list": [0, 2, 0, 1]},
        "attn_type_list must have 0 or 1 for each of 4 layers",
    ),
    (
        GROUPED | {"model_type": "minimax_m1", "attn_type_list": [0, 1] * 2, "shared_intermediate_size": 9},
        "shared_intermediate_size 9 is not supported: no published MiniMax has a shared expert",
    ),
    (
        GROUPED | {"model_type": "jamba", "attn_layer_offset": 8},
        "attn_layer_offset 8 is not less than attn_layer_period 8",
    ),
    (GROUPED | {"model_type": "jamba", "mamba_dt_rank": "half"}, "mamba_dt_rank must be an integer, and is 'half'"),
    (
        GROUPED | {"model_type": "nemotron_h"},
        "nemotron_h needs hybrid_override_pattern or layers_block_type, and the file has neither",
    ),
    (
        GROUPED | {"model_type": "nemotron_h", "hybrid_override_pattern": "M-X"},
        "hybrid_override_pattern must be a word of M, *, - and E, and is 'M-X'",
    ),
    (
        GROUPED | {"model_type": "nemotron_h", "layers_block_type": ["mamba", "rnn"]},
        "'rnn' is not a block of Nemotron-H; allowed are attention, full_attention, linear_attention, mamba, mlp, moe",
    ),
    (
        WIDTHS | {"model_type": "mamba2", "num_heads": 7},
        "num_heads 7 x head_dim 64 is not the inner width 96",
    ),
    (
        WIDTHS | {"model_type": "mamba2", "num_heads": 6, "head_dim": 16, "n_groups": 4},
        "n_groups 4 does not divide the 6 heads",
    ),
    (WIDTHS | {"model_type": "mamba", "expand": 0.3}, "expand 0.3 does not make 48 a whole number"),
    (WIDTHS | {"model_type": "mamba", "expand": "two"}, "expand must be a number above 0, and is 'two'"),
    (ORIGINAL | {"attn_layer_idx": [3]}, "attn_layer_idx [3] is not supported: attention layers are not read"),
    (ORIGINAL | {"d_intermediate": 64}, "d_intermediate 64 is not supported: an MLP in every layer is not read"),
    (ORIGINAL | {"ssm_cfg": {"layer": "Mamba3"}}, "layer 'Mamba3' is not supported; allowed are Mamba1, Mamba2"),
    (ORIGINAL | {"ssm_cfg": {"layer": "Mamba2", "headdim": 100}}, "headdim 100 does not divide the inner width 1,536"),
    (
        WIDTHS | {"model_type": "gla", "num_heads": 4, "num_kv_heads": 2},
        "num_kv_heads other than num_heads is not supported: the state is one per head",
    ),
    (WIDTHS | {"model_type": "gla", "num_heads": 5}, "expand_k gives 24 features, no multiple of num_heads 5"),
    (
        WIDTHS | {"model_type": "gla", "attn": {"layers": [7], "num_heads": 6}},
        "there is no layer 7; allowed are 0 to 1",
    ),
    (
        WIDTHS | {"model_type": "gla", "attn": {"layers": [1, 1], "num_heads": 6}},
        "layer 1 is given twice",
    ),
    (WIDTHS | {"model_type": "gla", "attn": "all"}, "attn must be an object, or a list of objects"),
    (
        WIDTHS | {"model_type": "gla", "attnres_block_size": 2},
        "attnres_block_size 2 is not supported: attention over residuals is not read",
    ),
    (
        WIDTHS | {"model_type": "delta_net", "use_beta": False},
        "use_beta false is not supported: the delta rule here has a learning rate",
    ),
    (
        WIDTHS | {"model_type": "kda", "num_heads": 2, "num_v_heads": 3},
        "num_v_heads 3 is not a multiple of num_heads 2",
    ),
    (WIDTHS | {"model_type": "gsa", "feature_map": "t2r"}, "feature_map t2r is not supported: it has parameters"),
    (RWKV | {"head_dim": 48}, "hidden_size 128 is not num_heads 2 x head_dim 48"),
    (RWKV | {"value_dim": 100}, "value_dim must be a multiple of hidden_size 128 for each of 3 layers"),
    (RWKV | {"v_low_rank_dim": None}, "rwkv7 needs v_low_rank_dim, and it is null"),
    (
        WIDTHS | {"model_type": "moba", "num_heads": 6, "use_output_gate": True},
        "use_output_gate true is not supported: MoBA's low-rank gate is not read",
    ),
    (
        GROUPED | {"model_type": "deepseek_v32", "q_lora_rank": None},
        "q_lora_rank is null, and the indexer's queries come from the query latent",
    ),
    (
        GROUPED | {"model_type": "powercoder", "sliding_window": 4096},
        "sliding_window 4096 is not supported: power attention keeps no window",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(read: Read, config: Settings, message: str) -> None:
    with pytest.raises(InputError, match=rf"config\.json:\d+:\d+: {re.escape(message)}$"):
        read(config)


values = (
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats(0, 4) | st.text(max_size=3) | st.just({}) | st.just([1])
)
KEYS = sorted(
    {key for row in COUNTS["models"] for key in row["config"]} | set(KIMI) | set(ORIGINAL) | {"attn_type_list"}
)


def outcome(data: Any) -> ModelSpec | InputError:
    try:
        return read_config(parse_json(json.dumps(data), "mine.json"), "mine")[0]
    except InputError as error:
        return error


@given(st.sampled_from(sorted({*FLA, *FAMILIES, ""})), st.dictionaries(st.sampled_from(KEYS), values, max_size=6))
def test_any_file_is_read_or_refused_with_its_place(family: str, changes: Settings) -> None:
    config = GROUPED | RWKV | changes | ({"model_type": family} if family else {"model_type": None, "d_model": 64})
    result = outcome(config)
    if isinstance(result, InputError):
        assert re.fullmatch(r"mine\.json:\d+:\d+", result.where or "")
    else:
        assert Accounting(result).total_parameters.with_embeddings > result.vocab_size * result.hidden_size
