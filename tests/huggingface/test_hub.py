"""Families whose code is on the hub: published files, what their layers differ in, and what their readers refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_decoders import Settings, mixers_by_layer
from hf_files import default_file

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.ffn import MLP, MoE
from powerplan.load import LoadedModel
from powerplan.mixers import Attention
from powerplan.spec import Layer

Read = Callable[[Settings], LoadedModel]

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "data" / "published_hub.json").read_text(encoding="utf-8")
)
"""Keys of config.json files, their parameters and where these are from: published, mlx-lm's model, or public code."""

REMARKS = {
    "Baichuan-M1-14B": (
        "baichuan_m1: the last key and value of each head, which its convolutions keep, are not counted",
    ),
    "LongCat-Flash-Lite": (
        "longcat_flash_ngram: the n-grams of a token are looked up in tables, which count like an embedding",
    ),
    "Ouro-1.4B": ("ouro: all layers run 4 times; each run is a layer here",),
}


def counted(loaded: LoadedModel) -> int:
    return Accounting(loaded.spec).total_parameters.with_embeddings


def layers_of(loaded: LoadedModel) -> list[Layer]:
    return [layer for group in loaded.spec.layers for layer in group.period * group.repeat]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(read: Read, name: str) -> None:
    loaded = read(PUBLISHED[name]["config"])
    assert counted(loaded) == PUBLISHED[name]["parameters"]
    assert loaded.notes == REMARKS.get(name, ())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("XVERSE-13B", {"num_experts": 64}, "num_experts 64 is not supported: experts of XVERSE-MoE are not read"),
        ("openPangu-Embedded-7B", {"sandwich_norm": True}, "sandwich_norm true is not supported: no published"),
        ("openPangu-Embedded-7B", {"qkv_bias": True}, "qkv_bias true is not supported: no published"),
        ("Orion-14B", {"attention_bias": True}, "attention_bias true is not supported: no published Orion has biases"),
        ("TeleChat2", {"embed_layernorm": True}, "embed_layernorm true is not supported: no published TeleChat"),
        (
            "TeleChat2",
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm true is not supported: no published TeleChat has it",
        ),
        ("Jais-13B", {"position_embedding_type": "rotary"}, "position_embedding_type 'rotary' is not supported"),
        ("OpenELM-1.1B", {"ffn_with_glu": False}, "ffn_with_glu false is not supported: no published OpenELM has it"),
        ("OpenELM-1.1B", {"share_input_output_layers": False}, "share_input_output_layers false is not supported"),
        ("OpenELM-1.1B", {"num_query_heads": [16]}, "num_query_heads has 1 entries for 28 layers"),
        ("OpenELM-1.1B", {"num_kv_heads": [0] * 28}, "num_kv_heads[0] must be above 0, and is 0"),
        ("OpenELM-1.1B", {"num_kv_heads": [7] * 28}, "num_kv_heads[0] is 7, which does not divide 16 heads"),
        (
            "OpenELM-1.1B",
            {"ffn_multipliers": 4.0},
            "ffn_multipliers must be a list with a number for each of 28 layers",
        ),
        ("OpenELM-1.1B", {"ffn_multipliers": [1.0]}, "ffn_multipliers must be a list with a number for each of 28"),
        ("OpenELM-1.1B", {"ffn_multipliers": [True] * 28}, "ffn_multipliers[0] must be a number from 0 to 1,000"),
        ("Baichuan-M1-14B", {"conv_window": 3}, "conv_window is not 2, as in every published Baichuan-M1"),
        (
            "Baichuan-M1-14B",
            {"num_swa_attention_heads": 7},
            "num_swa_attention_heads 7 does not divide hidden_size 5120",
        ),
        (
            "Baichuan-M1-14B",
            {"num_swa_key_value_heads": 7},
            "num_swa_key_value_heads 7 does not divide num_swa_attention_heads",
        ),
        ("Klear-46B", {"use_sliding_window": True, "sliding_window": 9}, "use_sliding_window is not supported"),
        (
            "Grok-2",
            {"sliding_window_size": 128},
            "sliding_window_size is not supported: no published Grok has a window",
        ),
        (
            "LongCat-Flash-Lite",
            {"emb_split_num": 3072},
            "emb_split_num 3072 makes 9216 tables of a hidden_size of 3072",
        ),
        ("Ouro-1.4B", {"total_ut_steps": 1000, "num_hidden_layers": 101}, "total_ut_steps 1000 makes 101,000 layers"),
    ],
)
def test_refusals(read: Read, name: str, changes: Settings, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read(PUBLISHED[name]["config"] | changes)
    assert "config.json:" in str(caught.value), "a message without a place"


def test_grok_1_is_tied_and_grok_2_is_not(read: Read) -> None:
    grok = {name: read(PUBLISHED[name]["config"]).spec for name in ("Grok-1", "Grok-2")}
    assert (grok["Grok-1"].tie_embeddings, grok["Grok-2"].tie_embeddings) == (True, False)
    assert [moe.shared_intermediate_size for moe in grok["Grok-2"].mixtures()] == [32_768]


@pytest.mark.parametrize(("step", "sparse"), [(1, [True] * 4), (2, [False, True, False, True])])
def test_layers_of_arctic(read: Read, step: int, sparse: list[bool]) -> None:
    loaded = read(default_file("arctic") | {"num_hidden_layers": 4, "moe_layer_frequency": step})
    assert [isinstance(layer.ffn, MoE) for layer in layers_of(loaded)] == sparse


def test_arctic_without_its_dense_mlp(read: Read) -> None:
    """With it, every layer of experts has an MLP as wide as the model (48), and a norm of its own."""
    alone = default_file("arctic") | {"num_hidden_layers": 4, "moe_layer_frequency": 1}
    assert counted(read(alone | {"use_residual": True})) - counted(read(alone)) == 4 * (3 * 48 * 48 + 48)


def test_windows_of_baichuan_m1(read: Read) -> None:
    """Layers with a window have heads of their own, and each head two weights for two tokens of keys and of values."""
    own = {"num_swa_attention_heads": 4, "num_swa_key_value_heads": 1, "num_key_value_heads": 2}
    loaded = read(default_file("baichuan_m1") | own | {"num_hidden_layers": 3, "sliding_window_layers": [0, 2]})
    local = Attention(heads=4, kv_heads=1, head_dim=12, window=9)
    assert mixers_by_layer(loaded.spec) == [local, Attention(heads=6, kv_heads=2, head_dim=8), local]
    assert [layer.extras[0].elements for layer in layers_of(loaded)] == [4, 8, 4]


@pytest.mark.parametrize(
    ("multiplier", "divisor", "width"), [(1.0, 8, 48), (1.1, 8, 56), (0.4, 8, 24), (0.25, 256, 256), (1.2, 50, 100)]
)
def test_widths_of_openelm(read: Read, multiplier: float, divisor: int, width: int) -> None:
    """48 wide: 52.8 rounds to 56, 19.2 to 16, less than nine tenths of it, so 24; 57.6 rounds to 50, so 100."""
    loaded = read(default_file("openelm") | {"ffn_multipliers": [multiplier] * 2, "ffn_dim_divisor": divisor})
    assert {layer.ffn for layer in layers_of(loaded)} == {MLP(intermediate_size=width)}


def test_openelm_without_norms_of_queries_and_keys(read: Read) -> None:
    file = default_file("openelm")
    assert counted(read(file)) - counted(read(file | {"normalize_qk_projections": False})) == 2 * 2 * 8


def test_jais_with_learned_positions(read: Read) -> None:
    file = default_file("jais") | {"n_positions": 32}
    assert counted(read(file | {"position_embedding_type": "learned"})) - counted(read(file)) == 32 * 48


def test_plamo_rounds_groups_up(read: Read) -> None:
    loaded = read(default_file("plamo") | {"n_shared_head": 4})
    assert {mixer.kv_heads for mixer in mixers_by_layer(loaded.spec) if isinstance(mixer, Attention)} == {2}


def test_runs_of_ouro(read: Read) -> None:
    """Each run of a layer has a cache of its own and no weights, and costs FLOPs; the gate is counted once."""
    file = PUBLISHED["Ouro-1.4B"]["config"]
    once, thrice = read(file | {"total_ut_steps": 1}), read(file | {"total_ut_steps": 3})
    assert counted(once) == counted(thrice)
    state = [Accounting(loaded.spec).row(1024).state_elements for loaded in (once, thrice)]
    assert state[1] == 3 * state[0]
    assert (once.spec.layer_count, thrice.spec.layer_count) == (24, 72)
    assert once.notes == ()


def test_tables_of_longcat(read: Read) -> None:
    """The i-th table has ratio x vocabulary + 2i + 1 rows, width 3072 / 12, and a projection to the width."""
    file = PUBLISHED["LongCat-Flash-Lite"]["config"]
    ngrams = ("ngram_vocab_size_ratio", "emb_neighbor_num", "emb_split_num")
    plain = read({key: value for key, value in file.items() if key not in ngrams} | {"model_type": "longcat_flash"})
    tables = [78 * 131_072 + 2 * index + 1 for index in range(12)]
    assert counted(read(file)) - counted(plain) == 256 * sum(tables) + 12 * 256 * 3072
