"""--like: a config.json of an unknown model_type, read as another family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from children import HUNG_S

from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.huggingface.audit import nearest_family
from powerplan.load import load_model

CONFIG: dict[str, Any] = {
    "model_type": "mine",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


def test_the_refusal_names_the_nearest_family(file: Path) -> None:
    with pytest.raises(InputError, match="its keys are most like those of llama: --like llama reads it so"):
        load_model(file)


@pytest.mark.parametrize(
    ("more", "family"),
    [
        ({}, "llama"),
        (
            {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
            "qwen3_moe",
        ),
        ({"kv_lora_rank": 8, "q_lora_rank": 8, "n_routed_experts": 4, "first_k_dense_replace": 1}, "deepseek_v3"),
    ],
)
def test_nearest(more: dict[str, Any], family: str) -> None:
    assert nearest_family(CONFIG | more) == family
    assert nearest_family({"a": 1, "b": 2, "hidden_size": 4}) is None


def test_it_is_read_as_the_family_says(file: Path) -> None:
    mine, llama = load_model(file, like="llama"), CONFIG | {"model_type": "llama"}
    file.write_text(json.dumps(llama), encoding="utf-8")
    own = load_model(file)
    assert mine.spec == own.spec
    assert mine.notes[0] == "read like llama, as --like says"


@pytest.mark.transformers
def test_what_transformers_remarks_on_is_not_repeated(file: Path) -> None:
    """It remarks on token ids beyond the vocabulary, on stderr and with each of its classes."""
    file.write_text(json.dumps(CONFIG | {"model_type": "olmo2", "bos_token_id": 98}), encoding="utf-8")
    command = [sys.executable, "-m", "powerplan", "wsfr", str(file), "--like", "llama", "--ctx", "1k"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HUNG_S)
    assert "transformers builds a olmo2" in done.stderr
    assert "token_id" not in done.stderr


def test_what_the_family_does_not_know_is_said(file: Path) -> None:
    file.write_text(json.dumps(CONFIG | {"levels_of_detail": 7}), encoding="utf-8")
    assert "not known for llama, and not counted: levels_of_detail" in load_model(file, like="llama").notes


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("change", "said"),
    [({}, "transformers builds a qwen2 of {built} parameters, and {counted} are counted here")],
)
def test_transformers_is_asked(file: Path, change: dict[str, Any], said: str) -> None:
    pytest.importorskip("transformers")
    file.write_text(json.dumps(CONFIG | {"model_type": "qwen2"} | change), encoding="utf-8")
    loaded = load_model(file, like="llama")
    counted = Accounting(loaded.spec).total_parameters.with_embeddings
    built = counted + 3 * (48 + 2 * 16)  # Qwen 2 has biases on queries, keys and values: 3 layers of 48, 16 and 16.
    assert said.format(built=f"{built:,}", counted=f"{counted:,}") in loaded.notes[-1]


def test_without_transformers_it_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert load_model(file, like="llama").notes[-1].startswith("not checked: with transformers and torch installed")


@pytest.mark.parametrize("command", ["wsfr", "budget", "decode", "recommend", "models", "profile"])
def test_bad_families(file: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    more = ["--flops", "1e20"] if command == "budget" else []
    assert main([command, str(file), "--like", "lama", *more]) == 2
    error = (
        "error: --like: 'lama' is not a family that is read; did you mean llama? powerplan models --families lists what"
    )
    assert error in capsys.readouterr().err
    assert main([command, "gpt2-small", "--like", "llama", *more]) == 2
    assert "--like: is for a config.json, and gpt2-small is a built-in model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "decode"])
def test_of_several_models_the_config_is_read_so(file: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(file), "gpt2-small", "--like", "llama", "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert ": read like llama, as --like says" in captured.err
    assert "gpt2-small" in captured.out
    assert main([command, "gpt2-small", "gpt2-xl", "--like", "llama"]) == 2
    assert "--like: is for a config.json, and gpt2-small is a built-in model" in capsys.readouterr().err


def test_a_command_reads_so(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wsfr", str(file), "--like", "llama", "--ctx", "1k"]) == 0
    assert "note: read like llama" in capsys.readouterr().err
