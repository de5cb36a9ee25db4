"""The built-in models against counts computed independently (tests/data/parameter_counts.json), to the digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from powerplan.accounting import Accounting
from powerplan.documents import parse_yaml
from powerplan.dump import spec_to_yaml
from powerplan.errors import InputError
from powerplan.load import aliases, catalogue_names, catalogue_spec, catalogue_text, find_name, load_model
from powerplan.validation import validate

COUNTS = json.loads((Path(__file__).parent / "data" / "parameter_counts.json").read_text(encoding="utf-8"))
ASSUMED = {f"power-paper-{size}" for size in ("small", "medium", "large", "1-12", "99-1")}
"""Geometries of the paper whose vocabulary it does not state: no count to compare with."""


@pytest.mark.parametrize("expected", COUNTS, ids=lambda row: row["name"])
def test_parameters_match_to_the_digit(expected: dict[str, Any]) -> None:
    accounting = Accounting(catalogue_spec(expected["name"]))
    if "params" in expected:
        assert accounting.total_parameters.with_embeddings == expected["params"]
        assert accounting.active_parameters.with_embeddings == expected["active"]
    else:  # RetNet's configurations state no vocabulary.
        assert accounting.total_parameters.without_embeddings == expected["params_without_embeddings"]


@pytest.mark.parametrize("expected", COUNTS, ids=lambda row: row["name"])
def test_cache_per_token_matches(expected: dict[str, Any]) -> None:
    uses = catalogue_spec(expected["name"]).layer_uses()
    entries = [use.layer.mixer.state_size(1).entry * use.count for use in uses if use.layer.mixer]
    if expected["name"] == "power-coder-3b":
        # The data file lists what softmax attention with these heads would cache; a power layer caches nothing.
        assert sum(entries) == 0
        assert expected["kv_bytes_per_token_bf16"] == 2 * 30 * 2 * (128 + 128)
    elif expected["kv_bytes_per_token_bf16"] is None:
        assert expected["name"] == "mistral-7b-v0.1"
        assert sum(entries) == 32 * 8 * (128 + 128)
    elif expected["name"] == "deepseek-v3.2-exp":
        # The data file leaves the indexer's keys out: 128 elements in each of 61 layers.
        assert 2 * sum(entries) == expected["kv_bytes_per_token_bf16"] + 2 * 61 * 128
    else:
        assert 2 * sum(entries) == expected["kv_bytes_per_token_bf16"]


@pytest.mark.parametrize("expected", [row for row in COUNTS if "state_elements" in row], ids=lambda row: row["name"])
def test_recurrent_state_matches(expected: dict[str, Any]) -> None:
    """State matrices; RWKV-7's file counts the two shifted tokens of each layer as well."""
    uses = catalogue_spec(expected["name"]).layer_uses()
    sizes = [(use.layer.mixer.state_size(1), use.count) for use in uses if use.layer.mixer]
    state, recent = (sum(getattr(size, part) * count for size, count in sizes) for part in ("recurrent", "recent"))
    assert state + (recent if expected["name"].startswith("rwkv7") else 0) == expected["state_elements"]
    if "conv_elements" in expected:
        assert recent == expected["conv_elements"]


PUBLISHED = [
    ("hyenadna-large-1m", "total", "with_embeddings", 1e6, "6.6"),
    ("stem-1b", "active", "with_embeddings", 1e9, "1.41"),
    ("ultramemv2-1.2b", "total", "without_embeddings", 1e9, "1.18"),
    ("apriel-h1-15b", "total", "without_input_embedding", 1e9, "15"),
]


@pytest.mark.parametrize(("name", "which", "convention", "unit", "printed"), PUBLISHED)
def test_published_sizes(name: str, which: str, convention: str, unit: float, printed: str) -> None:
    accounting = Accounting(catalogue_spec(name))
    counts = accounting.total_parameters if which == "total" else accounting.active_parameters
    assert f"{getattr(counts, convention) / unit:.{len(printed.partition('.')[2])}f}" == printed


def test_published_sizes_that_are_others() -> None:
    """STEM's total is that of its baseline with five tables beside; UltraMemV2 prints 225M for 224.4M."""
    stem = Accounting(catalogue_spec("stem-1b"))
    up_projections = 5 * 2048 * 8192
    assert f"{(stem.total_parameters.with_embeddings + up_projections) / 1e9:.2f}" == "6.75"
    ultramem = Accounting(catalogue_spec("ultramemv2-1.2b")).active_parameters.with_embeddings
    assert 0.995 < ultramem / 225e6 < 1


def test_every_model_is_checked() -> None:
    assert set(catalogue_names()) == {row["name"] for row in COUNTS} | ASSUMED


@pytest.mark.parametrize("name", catalogue_names())
def test_entries_are_complete_and_round_trip(name: str) -> None:
    spec = catalogue_spec(name)
    assert spec.name == name
    assert spec.source
    assert validate(parse_yaml(spec_to_yaml(spec), "again.yaml")) == spec
    assert spec_to_yaml(spec) == catalogue_text(name), "the catalogue is kept as powerplan models NAME --yaml prints it"


def test_aliases_are_unique_and_lead_to_models() -> None:
    listed = [alias for name in catalogue_names() for alias in catalogue_spec(name).aliases]
    assert len(listed) == len(set(listed)) == len(aliases())
    assert not set(listed) & set(catalogue_names())
    assert find_name("meta-llama-3.1-8b") == "llama-3.1-8b"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("gpt2", "gpt2-small"),
        ("GPT2-Small", "gpt2-small"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("powercoder-3b", "power-coder-3b"),
    ],
)
def test_names_people_write(written: str, name: str) -> None:
    assert load_model(written).spec.name == name


def test_a_mistyped_name_gets_the_nearest_three() -> None:
    with pytest.raises(
        InputError, match=r"'lama-3-8b' is neither a file nor a built-in model; did you mean llama-3-8b, "
    ):
        load_model("lama-3-8b")
    with pytest.raises(InputError) as caught:
        load_model("deepseek-v4")
    hint = caught.value.problem.split("did you mean ")[1].split("?")[0]
    assert len(hint.replace(" or ", ", ").split(", ")) == 3
    assert "deepseek-v3" in hint


def test_active_conventions_of_published_counts() -> None:
    deepseek = Accounting(catalogue_spec("deepseek-v3")).active_parameters
    assert deepseek.without_input_embedding == 36_625_618_432  # published 36.7B "incl 0.9B head"
    gpt_oss = Accounting(catalogue_spec("gpt-oss-20b")).active_parameters
    assert gpt_oss.without_input_embedding == 3_608_307_264  # published 3.6B: with the head, without the table
    tied = Accounting(catalogue_spec("gpt2-small")).total_parameters
    assert tied.with_embeddings - tied.without_input_embedding == 1024 * 768  # a tied table stays as the LM head
    assert tied.without_input_embedding - tied.without_embeddings == 50257 * 768
