"""Output fits the terminal from 60 columns on: no line is longer, and no number or word is divided or lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import powerplan.cli.dispatch
from powerplan.cli import main
from powerplan.report.tables import Column, table_of
from powerplan.report.width import terminal, wrapped

PROFILE = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "profile-cpu.json"

COMMANDS = [
    "wsfr llama-3-8b",
    "wsfr gemma-2-9b --by layer",
    "wsfr deepseek-v3 --by component --ctx 64k",
    "wsfr kimi-linear-48b-a3b --explain --ctx 64k",
    "compare gpt2-small llama-3-8b deepseek-v3",
    "budget llama-3-8b --ctx 128k --gpu h100-sxm --devices 64",
    "budget llama-3-8b gpt2-small --ctx 8k,64k --flops 1e22",
    "train llama-3-8b --ctx 128k --gpu h100-sxm --devices 64 --price 2.5",
    "train deepseek-v3 --gpu h200-sxm --devices 256 --stage 1T@4k --stage 100B@8k --parallel fsdp=32,ep=8,pp=8",
    "decode kimi-linear-48b-a3b --twin mla --gpu h100-sxm --devices 8",
    "recommend llama-3-8b --ctx 128k --gpu h100-sxm --devices 64 --price 2.5",
    "recommend deepseek-v3 --ctx 8k,64k",
    "recommend gpt2-small --solve context",
    "dims --head-dim 64,128",
    "dims --kind all",
    "dims --model llama-3-8b",
    "dims --model jamba-v0.1 --p 2,3",
    "recommend llama-3-8b --solve window --equal-state power:p=3",
    "recommend kimi-linear-48b-a3b --solve context --equal-state power:p=2",
    "models",
    "models --families",
    "models deepseek-v3",
    "hardware",
    "hardware h100-sxm",
    "reproduce table2",
    "reproduce training-time",
    "doctor",
    f"profile --show {PROFILE}",
]


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, columns: int) -> str:
    monkeypatch.setattr(powerplan.cli.dispatch, "columns", lambda: columns)
    assert main(command.split()) == 0
    return capsys.readouterr().out


def words(text: str) -> Counter[str]:
    """Return the words of a text and how often each stands in it, without rules of tables."""
    return Counter(word for word in text.split() if set(word) != {"-"})


@pytest.mark.parametrize("command", COMMANDS)
def test_output_fits_the_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = words(printed(monkeypatch, capsys, command, 400))
    for columns in (60, 80, 120, 200):
        text = printed(monkeypatch, capsys, command, columns)
        assert not [line for line in text.splitlines() if len(line) > columns]
        lost = whole - words(text)
        assert not lost, f"{columns} columns lose or divide {dict(lost)}"


def test_a_pipe_is_as_wide_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "gpt2-small", "deepseek-v3"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) > 80


def test_a_table_stands_in_parts_that_name_their_rows() -> None:
    columns = [Column("rank", "#"), Column("name", "candidate", left=True)]
    columns += [Column(f"c{place}", f"figure {place}") for place in range(8)]
    rows = [{"rank": 1, "name": "power p=2", **{f"c{place}": 123_456_789 for place in range(8)}}]
    with terminal(60):
        text = table_of(columns, rows)
    parts = text.split("\n\n")
    assert len(parts) == 3
    assert all("power p=2" in part for part in parts)
    assert text.count("123456789") == 8
    assert "\n\n" not in table_of(columns, rows)


def test_a_narrower_terminal_gets_sixty_columns() -> None:
    with terminal(10):
        lines = wrapped("eight letters " * 20, "head: ")
    assert 50 < max(map(len, lines)) <= 60
