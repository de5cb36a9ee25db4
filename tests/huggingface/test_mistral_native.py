"""Mistral's own params.json: sizes against published counts, the folders that have one, and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_decoders import Settings, mixers_by_layer

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.ffn import MoE
from powerplan.load import LoadedModel, load_model
from powerplan.mixers import MLA, Attention

SMALL: Settings = {
    "dim": 5120,
    "n_layers": 40,
    "head_dim": 128,
    "hidden_dim": 32_768,
    "n_heads": 32,
    "n_kv_heads": 8,
    "rope_theta": 1e9,
    "norm_eps": 1e-5,
    "vocab_size": 131_072,
    "max_seq_len": 131_072,
}
MIXTRAL: Settings = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14_336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32_000,
    "rope_theta": 1e6,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}
LARGE_3: Settings = {
    "dim": 7168,
    "n_layers": 61,
    "head_dim": 192,
    "hidden_dim": 16_384,
    "n_heads": 128,
    "n_kv_heads": 128,
    "rope_theta": 10_000.0,
    "norm_eps": 1e-6,
    "vocab_size": 131_072,
    "max_position_embeddings": 294_912,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
    "tied_embeddings": False,
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    "yarn": {"factor": 36, "original_max_position_embeddings": 8192, "beta": 32, "alpha": 1},
    "moe": {
        "expert_parallel": 1,
        "expert_model_parallel": 1,
        "route_every_n": 1,
        "first_k_dense_replace": 3,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0,
        "expert_hidden_dim": 4096,
        "num_shared_experts": 1,
    },
    "vision_encoder": {"hidden_size": 1664},
}

Reads = Callable[[Settings], LoadedModel]


@pytest.fixture
def reads(tmp_path: Path) -> Reads:
    """Write a params.json into a folder, mistral, and read the folder."""

    def write_and_load(data: Settings) -> LoadedModel:
        (tmp_path / "mistral").mkdir(exist_ok=True)
        (tmp_path / "mistral" / "params.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
        return load_model(tmp_path / "mistral")

    return write_and_load


@pytest.mark.parametrize(
    ("data", "parameters", "active"),
    [(SMALL, 23_572_403_200, None), (MIXTRAL, 46_702_792_704, 12_879_925_248), (LARGE_3, 673_421_089_792, None)],
    ids=["Mistral Small", "Mixtral", "Mistral Large 3"],
)
def test_published_counts(reads: Reads, data: Settings, parameters: int, active: int | None) -> None:
    accounting = Accounting(reads(data).spec)
    assert accounting.total_parameters.with_embeddings == parameters
    assert active is None or accounting.active_parameters.with_embeddings == active


def test_large_3(reads: Reads) -> None:
    loaded = reads(LARGE_3)
    assert {type(mixer) for mixer in mixers_by_layer(loaded.spec)} == {MLA}
    assert [isinstance(group.period[0].ffn, MoE) for group in loaded.spec.layers] == [False, True]
    assert loaded.notes == (
        "params.json: the text decoder alone is counted, other towers and projectors are not",
        "RoPE is left out: yarn of params.json is not read",
    )


def test_name_and_positions(reads: Reads) -> None:
    loaded = reads(SMALL)
    assert (loaded.spec.name, loaded.notes) == ("mistral", ())
    assert loaded.spec.rope is not None
    assert loaded.spec.rope.theta == 1e9


def test_a_window(reads: Reads) -> None:
    heads = {"n_kv_heads": None, "head_dim": None}
    loaded = reads(SMALL | heads | {"sliding_window": 4096, "tied_embeddings": True})
    assert set(mixers_by_layer(loaded.spec)) == {Attention(heads=32, kv_heads=32, head_dim=160, window=4096)}
    assert loaded.spec.tie_embeddings is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_biases": True}, "use_biases true is not supported: no published Mistral has biases"),
        ({"n_kv_heads": 5}, "n_kv_heads 5 does not divide n_heads 32"),
        ({"moe": MIXTRAL["moe"] | {"route_every_n": 2}}, "route_every_n is not 1, as in every published Mistral"),
        ({"moe": {"num_experts": 4, "num_experts_per_tok": 5}}, "num_experts_per_tok"),
        ({"hidden_dim": "wide"}, "hidden_dim must be"),
        ({"lora_rank": 8}, "lora_rank"),
    ],
)
def test_refusals(reads: Reads, changes: Settings, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        reads(SMALL | changes)
    assert "params.json:" in str(caught.value)


def test_quantization_is_remarked_on(reads: Reads) -> None:
    loaded = reads(SMALL | {"quantization": {"qformat_weight": "fp8_e4m3"}})
    assert loaded.notes == ("quantization of params.json is not read: bytes follow the dtype",)


def test_config_json_goes_first(reads: Reads, tmp_path: Path) -> None:
    reads(SMALL)
    gpt: dict[str, Any] = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257}
    (tmp_path / "mistral" / "config.json").write_text(json.dumps(gpt), encoding="utf-8")
    assert load_model(tmp_path / "mistral").spec.hidden_size == 768


def test_that_of_llama_lacks_the_width_of_its_mlp(reads: Reads) -> None:
    with pytest.raises(InputError, match=r"is the params\.json of an original checkpoint \(Llama\)"):
        reads({"dim": 4096, "multiple_of": 1024, "n_heads": 32, "n_layers": 32, "vocab_size": 128_256})
