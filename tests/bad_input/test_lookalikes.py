"""Files that come with a model and are not its config.json: each is named, and so is the one to give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from powerplan.cli import main

Refuses = Callable[[list[str], str], None]

BESIDE = "give the config.json beside it, or the folder that holds both"
ORIGINAL = (
    "is the params.json of an original checkpoint (Llama), which leaves sizes to its code; "
    "give the config.json of the same model as transformers has it"
)
ADAPTER = "is the adapter_config.json of a PEFT adapter, which has no sizes; give the config.json of its base model"
LLAMA_2 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1}
LORA = {"peft_type": "LORA", "r": 16, "base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}

FILES: dict[str, tuple[Any, str]] = {
    "params.json": (LLAMA_2, ORIGINAL),
    "adapter_config.json": (LORA, ADAPTER),
    "model.safetensors.index.json": ({"weight_map": {}}, f"is the index of a checkpoint's weights; {BESIDE}"),
    "generation_config.json": ({"temperature": 0.6}, f"is settings of text generation; {BESIDE}"),
    "tokenizer_config.json": ({"model_max_length": 4096}, f"is a tokenizer's file; {BESIDE}"),
    "tokenizer.json": ({"version": "1.0"}, f"is a tokenizer's file; {BESIDE}"),
    "hf_quant_config.json": ({"quantization": {}}, f"is the quantization of a checkpoint, without sizes; {BESIDE}"),
    "model-00001-of-00002.safetensors": (b"\x10\0\0\0\0\0\0\0{}", f"is a file of weights; {BESIDE}"),
    "pytorch_model.bin": (b"PK\x03\x04", f"is a file of weights; {BESIDE}"),
    "model-Q4_K_M.gguf": (
        b"GGUF\x03\0\0\0",
        "is a GGUF checkpoint; give the config.json of the model that it was converted from",
    ),
    # The same by their content.
    "llama.json": (LLAMA_2, ORIGINAL),
    "lora.json": (LORA, f"{ADAPTER}, 'meta-llama/Llama-2-7b-hf'"),
    "index.json": ({"metadata": {}, "weight_map": {}}, f"is the index of a checkpoint's weights; {BESIDE}"),
    "generation.json": (
        {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.38.0"},
        f"is settings of text generation; {BESIDE}",
    ),
    "quant.json": (
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}},
        f"is the quantization of a checkpoint, without sizes; {BESIDE}",
    ),
    "tokens.json": ({"tokenizer_class": "LlamaTokenizer"}, f"is a tokenizer's file; {BESIDE}"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_config(
    name: str, expect_refusal: Refuses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, message = FILES[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    expect_refusal(["wsfr", name], f"{name}: {message}")


def test_a_folder_that_holds_one_of_them(
    expect_refusal: Refuses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text(json.dumps(LORA))
    hint = ADAPTER.removeprefix("is ").replace("; ", ": ")
    message = f"lora: is a folder without a config.json that can be read; it has adapter_config.json, {hint}"
    expect_refusal(["wsfr", "lora"], message)


@pytest.mark.parametrize("name", ["params.json", "tokens.json"])
def test_a_config_is_read_whatever_its_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257, "tokenizer_class": "GPT2Tokenizer"}
    path = tmp_path / name
    path.write_text(json.dumps({"model_type": "gpt2"} | sizes))
    assert main(["models", str(path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["params_total"] == 124_439_808
