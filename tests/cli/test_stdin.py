"""MODEL as "-": a YAML or a config.json on standard input, told apart by what they hold."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from powerplan.cli import main
from powerplan.load import catalogue_text

YAML = catalogue_text("gpt2-small").replace("name: gpt2-small", "name: mine")
CONFIG = json.dumps({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257})
SCRIPT = Path(sys.executable).with_name("powerplan")

Give = Callable[[str | bytes], None]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Give:
    """Put text on standard input."""
    monkeypatch.chdir(tmp_path)

    def put(text: str | bytes) -> None:
        raw = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))

    return put


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert code == (2 if captured.err.startswith("error:") else 0)
    return captured.out, captured.err


@pytest.mark.parametrize(
    "command",
    [
        "wsfr - --ctx 64k",
        "models -",
        "models - --yaml",
        "budget - --tokens 1B",
        "decode -",
        "recommend - --ctx 16k",
        "train - --ctx 8k --gpu h100-sxm",
        "compare - gpt2-xl",
        "wsfr - --mixer power:p=2 --json",
    ],
)
def test_a_yaml(command: str, give: Give, capsys: pytest.CaptureFixture[str]) -> None:
    Path("m.yaml").write_text(YAML)
    expected = answer(
        capsys, *command.replace(" - ", " m.yaml ").replace(" -", " m.yaml", command.endswith(" -")).split()
    )
    give(YAML)
    out, err = answer(capsys, *command.split())
    assert (out, err) == (expected[0].replace(" m.yaml", " -"), expected[1])
    assert "mine" in expected[0]


def test_a_config(give: Give, capsys: pytest.CaptureFixture[str]) -> None:
    give(CONFIG)
    out, err = answer(capsys, "models", "-", "--json")
    assert (json.loads(out)["params_total"], json.loads(out)["name"], err) == (124_439_808, "stdin", "")


def test_a_config_of_another_family(give: Give, capsys: pytest.CaptureFixture[str]) -> None:
    text = CONFIG.replace("gpt2", "gpt2_like_it")
    give(text)
    assert "gpt2_like_it" in answer(capsys, "models", "-")[1]
    give(text)
    assert json.loads(answer(capsys, "models", "-", "--like", "gpt2", "--json")[0])["params_total"] == 124_439_808
    give(text)
    out, _ = answer(capsys, "compare", "gpt2-xl", "-", "--like", "gpt2", "--json")
    assert [model["name"] for model in json.loads(out)["models"]] == ["gpt2-xl", "stdin"]
    give(YAML)
    _, err = answer(capsys, "compare", "gpt2-xl", "-", "--like", "gpt2")
    assert err == "error: --like: is for a config.json, and gpt2-xl is a built-in model\n"
    give(YAML)
    assert answer(capsys, "wsfr", "-", "--like", "gpt2")[1] == (
        "error: --like: is for a config.json, and <stdin> is a powerplan YAML\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (YAML.replace("heads: 12", "heads: 1x"), "<stdin>:14:37: layers[0].mixer.heads: '1x' is not an integer"),
        (
            YAML.replace("hidden_size", "hiden_size"),
            "<stdin>:8:1: hiden_size: unknown key; did you mean hidden_size? ...",
        ),
        ("", "<stdin>: is empty"),
        ("{", "<stdin>:2:1: is not valid YAML: ..."),
        ('{"model_type": "gpt2",}', "<stdin>:1:23: ..."),
        (b"\xff\xfe", "<stdin>: is not UTF-8 text (byte 0xff at offset 0)"),
        (b"name: a\0b", "<stdin>: is not text (a NUL character at offset 7)"),
        ("#" * (2**20 + 1), "<stdin>: is larger than 1 MiB; a model spec is a few kilobytes"),
        ('{"a": "' + "x" * 2**24, "<stdin>: is larger than 16 MiB; a config.json has some megabytes at most"),
        (json.dumps({"peft_type": "LORA"}), "<stdin>: is the adapter_config.json of a PEFT adapter, ..."),
    ],
    ids=lambda value: str(value)[:20],
)
def test_messages(text: str | bytes, message: str, give: Give, capsys: pytest.CaptureFixture[str]) -> None:
    give(text)
    out, err = answer(capsys, "wsfr", "-")
    assert out == ""
    begin, dots, _ = message.partition("...")
    assert err.startswith(f"error: {begin}") if dots else err == f"error: {message}\n"
    assert err.count("\n") == 1


def test_at_most_once(give: Give, capsys: pytest.CaptureFixture[str]) -> None:
    give(YAML)
    message = "error: MODEL: - is there more than once, and standard input holds one model\n"
    assert answer(capsys, "compare", "-", "-") == ("", message)
    assert answer(capsys, "decode", "-", "gpt2-small", "-", "--like", "gpt2") == ("", message)


def test_a_file_of_that_name_is_given_with_its_folder(give: Give, capsys: pytest.CaptureFixture[str]) -> None:
    Path("-").write_text(YAML.replace("mine", "other"))
    give(YAML)
    assert answer(capsys, "wsfr", "-")[0].startswith("mine:")
    assert answer(capsys, "wsfr", "./-")[0].startswith("other:")


def test_a_pipe_a_closed_stream_and_a_terminal() -> None:
    command = [SCRIPT, "wsfr", "-", "--ctx", "64k"]
    piped = subprocess.run(command, input=YAML, capture_output=True, text=True, check=True)
    assert piped.stdout.startswith("mine:")
    closed = subprocess.run(["bash", "-c", f"'{SCRIPT}' wsfr - <&-"], capture_output=True, text=True, check=False)
    assert closed.returncode == 2
    assert closed.stderr.startswith("error: <stdin>: ")
    ours, theirs = pty.openpty()
    os.write(ours, YAML.encode() + b"\x04")
    typed = subprocess.run(command, stdin=theirs, capture_output=True, text=True, check=True)
    os.close(ours)
    os.close(theirs)
    assert typed.stdout == piped.stdout
