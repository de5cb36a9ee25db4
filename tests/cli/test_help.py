"""Help: it fits the terminal, every option has a panel, and every example runs."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from powerplan.cli import main
from powerplan.cli import profile as profile_command
from powerplan.cli.app import COMMANDS
from powerplan.cli.help import (
    CACHES,
    COMMAND_PANELS,
    DEVICES,
    EXAMPLES,
    FORMATS,
    MODEL,
    ORDER,
    OUTPUT,
    PANELS,
    WIDEST,
)
from powerplan.load import catalogue_text
from powerplan.profile import load_profile

PROFILE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "profile-cpu.json"
CONFIG = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257}


def helped(
    command: str,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str = "--help",
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*command.split(), option]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def words(text: str) -> Counter[str]:
    return Counter(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = words(helped(command, 400, monkeypatch, capsys))
    for columns in (60, 80, 120):
        text = helped(command, columns, monkeypatch, capsys)
        assert not [line for line in text.splitlines() if len(line) > columns]
        lost = whole - words(text)
        assert not lost, f"{columns} columns lose or divide {dict(lost)}"
    assert helped(command, 60, monkeypatch, capsys, "-h") == helped(command, 60, monkeypatch, capsys)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_the_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = helped(command, 60, monkeypatch, capsys)
    shown = [line.strip() for line in text.split(" Examples:\n")[1].splitlines() if line.strip()]
    assert shown == EXAMPLES[command]
    assert 1 <= len(shown) <= 4
    assert all(line.startswith(f"powerplan {command}".strip()) for line in shown)


def test_panels_are_those_that_are_known() -> None:
    assert set(PANELS.values()) == set(ORDER) - {None}
    assert set(COMMANDS) <= set(COMMAND_PANELS)
    assert set(EXAMPLES) == {"", *COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_have_a_panel_of_their_own(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = helped(command, 80, monkeypatch, capsys)
    panels = re.findall(r"╭─ (.+?) ─", text)
    assert len(set(panels)) == len(panels)
    assert ("Arguments" in panels) == bool(re.search(r"\[OPTIONS\] .*[A-Z]", text.splitlines()[1]))


def test_the_panels_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped("recommend", 80, monkeypatch, capsys)
    panels = re.findall(r"╭─ (.+?) ─", text)
    assert panels == ["Arguments", "Options", *(panel for panel in ORDER if panel and panel != CACHES)]
    assert re.findall(r"╭─ (.+?) ─", helped("decode", 80, monkeypatch, capsys)) == [
        *("Arguments", "Options", MODEL, FORMATS, CACHES, DEVICES, OUTPUT),
    ]


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "report":
        pytest.importorskip("vl_convert")
    measured = load_profile(str(PROFILE))
    monkeypatch.setattr(profile_command, "_measured", lambda session, signals: measured)
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text(catalogue_text("gpt2-small"), encoding="utf-8")
    Path("config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    for example in EXAMPLES[command]:
        _, *arguments = shlex.split(example)
        assert main(arguments) == 0, example
        captured = capsys.readouterr()
        assert captured.out or "note: wrote" in captured.err


@pytest.mark.parametrize("columns", ["9" * 20, "9" * 5000, "1000000", "0", "-5", "1e3", "", "x"])
def test_columns_that_no_terminal_has(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for arguments in (["--help"], ["wsfr", "--help"]):
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert "--help" in captured.out
        assert max(map(len, captured.out.splitlines())) <= WIDEST
        assert captured.err == ""
    assert os.environ["COLUMNS"] == columns
