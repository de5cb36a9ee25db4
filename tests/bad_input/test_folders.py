"""MODEL as a folder: what is read in it, what the model is called, and what is said where it has no config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from powerplan.load import load_model

GPT = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257}
NO_CONFIG = "is a folder without a config.json that can be read"

Refuses = Callable[[list[str], str], None]


def cached(root: Path, *snapshots: str, main: str | None = None) -> Path:
    """Make a folder of the Hugging Face cache: links in snapshots to blobs, and refs/main."""
    folder = root / "models--openai--tiny.gpt"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    if main is not None:
        (folder / "refs" / "main").write_text(main + "\n", encoding="utf-8")
    for index, name in enumerate(snapshots):
        blob = folder / "blobs" / f"b{index}"
        blob.write_text(json.dumps(GPT | {"n_layer": 12 + index}), encoding="utf-8")
        (folder / "snapshots" / name).mkdir(parents=True)
        (folder / "snapshots" / name / "config.json").symlink_to(Path("..") / ".." / "blobs" / f"b{index}")
    return folder


def test_a_folder_of_the_cache(tmp_path: Path) -> None:
    """A snapshot's file is a link to a blob whose name says nothing; the model has the name of its repository."""
    folder = cached(tmp_path, "abc")
    for model in (folder, folder / "snapshots" / "abc", folder / "snapshots" / "abc" / "config.json"):
        assert load_model(model).spec.name == "tiny.gpt"


def test_main_tells_which_snapshot_is_read(tmp_path: Path) -> None:
    folder = cached(tmp_path, "abc", "def", main="def")
    assert load_model(folder).spec.layer_count == 13


def test_snapshots_that_main_does_not_tell_apart(
    expect_refusal: Refuses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(tmp_path, "abc", "def")
    monkeypatch.chdir(tmp_path)
    expect_refusal(["wsfr", "models--openai--tiny.gpt"], f"models--openai--tiny.gpt: {NO_CONFIG}")


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ([], ""),
        (
            ["model.safetensors.index.json", "model-1.safetensors"],
            "; it has model.safetensors.index.json, the index of a checkpoint's weights: "
            "give the config.json of the same checkpoint, which has the sizes",
        ),
        (
            ["pytorch_model.bin"],
            "; it has pytorch_model.bin, a file of weights: "
            "give the config.json of the same checkpoint, which has the sizes",
        ),
        (
            ["model.safetensors", "model-Q4.gguf"],
            "; it has model-Q4.gguf, a GGUF checkpoint: give the config.json of the model that it was converted from",
        ),
        (["llm/config.json", "vit/weights"], "; llm in it has one"),
        (
            ["models--a--b/snapshots/x/y", "models--a--c/refs/main"],
            "; it has the folders of 2 cached models: give one of these",
        ),
    ],
)
def test_what_a_folder_without_config_has(
    expect_refusal: Refuses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    for name in files:
        (Path("model") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("model") / name).write_text("", encoding="utf-8")
    expect_refusal(["wsfr", "model"], f"model: {NO_CONFIG}{hint}")
