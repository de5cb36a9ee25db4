"""Output fits the terminal from 60 columns on: no line is longer, and no number or word is divided or lost."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from children import HUNG_S

import powerplan
import powerplan.cli.dispatch
from powerplan.balance import verdict_of
from powerplan.cli import main, say
from powerplan.doctor import Finding
from powerplan.report.catalogue import doctor_report
from powerplan.report.colour import colour, painted, side_of
from powerplan.report.render import render
from powerplan.report.tables import Column, table_of
from powerplan.report.width import command_lines, terminal, wrapped

PROFILE = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "profile-cpu.json"

COMMANDS = [
    "wsfr llama-3-8b",
    "wsfr gemma-2-9b --by layer",
    "wsfr deepseek-v3 --by component --ctx 64k",
    "wsfr kimi-linear-48b-a3b --explain --ctx 64k",
    "wsfr llama-3-8b --mixer hyena --explain --form chunked --ctx 64k",
    "wsfr llama-3-8b --mixer span_search --by component --ctx 64k",
    "decode llama-3-8b --mixer memory_sparse --gpu h100-sxm",
    "decode llama-3-8b --ctx 8k,64k,1M --cache-budget 4k --gpu h100-sxm",
    "wsfr llama-3-8b --lengths lognormal:mean=4k,p99=64k",
    "compare gpt2-small llama-3-8b deepseek-v3",
    "budget llama-3-8b --ctx 128k --gpu h100-sxm --devices 64",
    "budget llama-3-8b gpt2-small --ctx 8k,64k --flops 1e22",
    "train llama-3-8b --ctx 128k --gpu h100-sxm --devices 64 --price 2.5",
    "train deepseek-v3 --gpu h200-sxm --devices 256 --stage 1T@4k --stage 100B@8k --parallel fsdp=32,ep=8,pp=8",
    "budget llama-3-8b --ctx 64k --lengths 1k:0.9,64k:0.1 --gpu h100-sxm",
    "budget llama-3-8b gpt2-small --ctx 8k,64k --lengths 4k --gpu h100-sxm --devices 8",
    "train deepseek-v3 --ctx 4k --gpu h800-sxm --devices 512 --zero 1 --schedule dualpipe --matmuls-dtype fp8",
    "train llama-3-8b --ctx 64k --gpu h100-sxm --devices 64 --lengths 1k:0.9,64k:0.1 --parallel fsdp=8,cp=8",
    "train qwen3-next-80b-a3b --ctx 256k --gpu h100-sxm --devices 128 --parallel fsdp=8,cp=16",
    "decode kimi-linear-48b-a3b --twin mla --gpu h100-sxm --devices 8",
    "decode qwen3.5-35b-a3b llama-3-8b --cache-dtype int4:group=64 --engine vllm --checkpoint-every 4k",
    "decode stem-1b ultramemv2-1.2b --batch 1,64",
    "decode qwen3-next-80b-a3b --ctx 8k,1M --batch 1,8 --gpu h200-sxm",
    "wsfr power-coder-3b --form chunked --explain --ctx 64k",
    "wsfr ultramemv2-1.2b --explain --ctx 4k",
    "decode kimi-linear-48b-a3b --cache-budget 4k --prefill-chunk 8k --page 64 --gpu h100-sxm --devices 8",
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
    "reproduce",
    "reproduce table2",
    "reproduce training-time",
    "reproduce field",
    "doctor",
    f"profile --show {PROFILE}",
]


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, columns: int) -> str:
    monkeypatch.setattr(powerplan.cli.dispatch, "columns", lambda: columns)
    assert main(command.split()) == 0
    return capsys.readouterr().out


@pytest.fixture
def answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command that is printed in several widths be answered once: the answer knows no width."""

    def once(answer: Callable[..., Any]) -> Callable[..., Any]:
        kept: dict[str, Any] = {}

        def kept_answer(*given: Any, **settings: Any) -> Any:
            key = repr((given, settings))
            if key not in kept:
                kept[key] = answer(*given, **settings)
            return kept[key]

        return kept_answer

    for name in ("recommend", "train"):  # Half of the time of all these commands.
        monkeypatch.setattr(powerplan, name, once(getattr(powerplan, name)))


def words(text: str) -> Counter[str]:
    """Return the words of a text and how often each stands in it, without rules of tables."""
    return Counter(word for word in text.split() if set(word) != {"-"})


@pytest.mark.usefixtures("answered_once")
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


MACHINES = {
    "nothing": [
        Finding("defaults", "powerplan.toml"),
        Finding("default of ctx", "1k,2k,4k,8k,16k,32k,64k,128k,256k,512k,1M"),
        Finding("torch", "not installed", ok=False, remedy="pip install torch"),
        Finding("triton", "not installed; it comes with torch for CUDA, for kernels on a GPU"),
        Finding(
            "vl-convert-python",
            "not installed",
            ok=False,
            remedy="pip install vl-convert-python jinja2, for powerplan report",
        ),
        Finding("accelerator", "not looked for, as torch is not installed", ok=False),
    ],
    "hopper": [
        Finding("accelerator 0", "NVIDIA H100 80GB HBM3, sm_90, 79.19 GiB", ok=True),
        Finding("Hopper engine, 0", "can run p = 2 in bf16", ok=True),
        Finding("POWERPLAN_HOPPER", "'ALL' is not known", ok=False, remedy="set it to all, or not at all"),
        Finding(
            "Hopper compiler",
            "triton 3.7.0 miscompiles products whose left operand stays in registers over a loop",
            remedy="none needed for powerplan, which has no such product; for other kernels, a triton after 3.7.0",
        ),
    ],
}


@pytest.mark.parametrize("machine", MACHINES)
def test_doctor_fits_whatever_it_finds(machine: str) -> None:
    """One table, and what is to be done in lines below it."""
    with terminal(400):
        whole = words(render(doctor_report(MACHINES[machine]), "table"))
    for columns in (60, 80, 120):
        with terminal(columns):
            text = render(doctor_report(MACHINES[machine]), "table")
        assert not [line for line in text.splitlines() if len(line) > columns]
        assert not whole - words(text)
        table, after = text.split("\n\n")
        assert "found" in table
        remedies = [f"{one.what}: {one.remedy}" for one in MACHINES[machine] if one.remedy]
        assert after.replace("\n  ", " ").splitlines() == remedies


def test_a_pipe_is_as_wide_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "gpt2-small", "deepseek-v3"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) > 80


def test_a_table_stands_in_parts_that_name_their_rows() -> None:
    columns = [Column("rank", "#"), Column("name", "candidate", left=True)]
    columns += [Column(f"c{place}", f"figure {place}") for place in range(12)]
    rows = [{"rank": 1, "name": "power p=2", **{f"c{place}": 123_456_789 for place in range(12)}}]
    with terminal(60):
        text = table_of(columns, rows)
    parts = text.split("\n\n")
    assert len(parts) == 3
    assert all("power p=2" in part for part in parts)
    assert text.count("123456789") == 12
    assert "\n\n" not in table_of(columns, rows)


def test_columns_move_together_before_a_table_is_divided() -> None:
    columns = [Column("name", "model", left=True), *(Column(f"c{place}", f"figure {place}") for place in range(5))]
    rows = [{"name": "gpt2-small", **{f"c{place}": 12 for place in range(5)}}]
    gaps = {}
    for width in (80, 65, 60):
        with terminal(width):
            heading = table_of(columns, rows).splitlines()[0]
        assert "figure 4" in heading
        gaps[width] = re.findall(" {2,}", heading.strip())[1:]
    assert {width: {*map(len, own)} for width, own in gaps.items()} == {80: {4}, 65: {3}, 60: {2}}


def test_notes_end_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "qwen3: trained for contexts up to 40,960 tokens: longer ones need RoPE scaling and further training"
    say.note(text)
    say.error(text)
    assert capsys.readouterr().err == f"note: {text}\nerror: {text}\n", "one line in a file, which programs read"
    monkeypatch.setattr(say, "columns", lambda stream: 60)
    for coloured in (False, True):
        monkeypatch.setattr(say, "coloured", lambda stream, coloured=coloured: coloured)
        say.note(text)
        lines = ANSI.sub("", capsys.readouterr().err).splitlines()
        assert len(lines) == 2
        assert max(map(len, lines)) <= 60
        assert " ".join(lines) == f"note: {text}"


def test_a_narrower_terminal_gets_sixty_columns() -> None:
    with terminal(10):
        lines = wrapped("eight letters " * 20, "head: ")
    assert 50 < max(map(len, lines)) <= 60


COLOURED = [
    "wsfr llama-3-8b",
    "wsfr gpt2-small --explain --ctx 64k",
    "compare gpt2-small llama-3-8b",
    "train llama-3-8b --ctx 128k --gpu h100-sxm --devices 64",
    "decode llama-3-8b --gpu h100-sxm",
    "recommend llama-3-8b --ctx 8k,128k",
    "budget --flops 1e21",
    f"profile --show {PROFILE}",
]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.usefixtures("answered_once")
@pytest.mark.parametrize("command", COLOURED)
def test_colour_changes_no_text(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in (60, 120):
        plain = printed(monkeypatch, capsys, command, columns)
        with monkeypatch.context() as patch:
            patch.setattr(say, "coloured", lambda stream: True)
            text = printed(monkeypatch, capsys, command, columns)
        assert "\x1b" not in plain
        assert text != plain
        assert ANSI.sub("", text) == plain


@pytest.mark.parametrize("form", ["json", "csv", "markdown"])
def test_other_formats_have_no_colour(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(say, "coloured", lambda stream: True)
    assert "\x1b" not in printed(monkeypatch, capsys, f"recommend gpt2-small --ctx 64k --format {form}", 80)


def test_colours_say_what_signs_say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(say, "coloured", lambda stream: True)
    text = printed(monkeypatch, capsys, "wsfr gpt2-small --ctx 1k,13403,64k", 80)
    sides = {"67": "weight", "65": "balanced", "130": "state"}
    found = re.findall(r"\x1b\[38;5;(\d+)m(\S+)\x1b", text)
    assert [sides[code] for code, _ in found] == ["weight", "balanced", "state"]
    for code, ratio in found:
        weight, state = ratio.split(":")
        assert verdict_of(Fraction(weight) / Fraction(state)).side == sides[code]
    assert (side_of(None), side_of(2), side_of(2, 2)) == (None, "weight", "balanced")


def test_spaces_stay_plain_and_no_colour_means_none() -> None:
    assert painted("  x ", "strong") == "  x "
    with colour(True):
        assert painted("  x ", "strong") == "  \x1b[1mx\x1b[0m "
        assert painted("   ", "strong") == "   "
        assert painted("x", None) == "x"
        with colour(False):
            assert painted("x", "strong") == "x"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo terminals here")
@pytest.mark.parametrize(
    ("environment", "has_colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_has_colour_unless_told_otherwise(environment: dict[str, str], has_colour: bool) -> None:
    ours, theirs = os.openpty()
    try:
        plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        subprocess.run(
            [sys.executable, "-m", "powerplan", "wsfr", "gpt2-small", "--ctx", "64k"],
            check=True,
            stdout=theirs,
            env=plain | {"TERM": "xterm"} | environment,
            timeout=HUNG_S,
        )
        assert (b"\x1b[" in os.read(ours, 65_536)) == has_colour
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_pipe_needs_no_rich() -> None:
    code = "import sys, powerplan.cli as cli; cli.main(['wsfr', 'gpt2-small']); sys.exit('rich.style' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=HUNG_S)


def test_a_command_stays_one_command() -> None:
    command = "powerplan recommend 'my models/a.yaml' --ctx 64k,128k --gpu h100-sxm --devices 64 --price 2.5"
    for columns in (60, 80, None):
        with terminal(columns):
            lines = command_lines(command, " " * 9)
        assert max(map(len, lines)) <= (columns or 98)
        assert all(line.endswith(" \\") for line in lines[:-1])
        assert not any(re.search(r"--\w+( \\)?$", line) for line in lines)
        assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)
