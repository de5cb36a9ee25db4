"""Options of profile: each mistake has one message, and what this machine cannot do has another exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from powerplan.cli import main
from powerplan.mixers import MIXERS

BESIDE = ("gla", "deltanet", "gated_deltanet", "kda", "mamba1", "mamba2", "log_linear", "rwkv7", "gsa")
"""Recurrent kinds that `--against` times."""

COMMANDS = {
    "gpt2-small --p 5": "--p: 5 is out of range; allowed are 1 to 4",
    "gpt2-small --p 0": "--p: 0 is out of range; allowed are 1 to 4",
    "gpt2-small --p two": "--p: 'two' is not an integer; write a number or a list such as 2,3,4",
    "gpt2-small --p 2 --mixer linear": "--p and --mixer both say which mixer to measure; give one of them",
    "gpt2-small --mixer power:p=5": "--mixer: p=5: the kernels run degrees 1 to 4",
    **{
        f"gpt2-small --mixer {kind}": f"--mixer: {kind}: profile times attention, windows, power and linear attention"
        + (f"; give it as --against {kind}" if kind in BESIDE else "")
        for kind in sorted(MIXERS.keys() - {"attention", "power", "linear"})
    },
    "kimi-linear-48b-a3b": "MODEL: kimi-linear-48b-a3b has layers whose mixer has no heads that another could take",
    "gpt2-small --mixer powr:p=2": "--mixer: 'powr' is not a mixer; did you mean power...",
    "gpt2-small --ctx 0": "--ctx: '0' is out of range; ...",
    "gpt2-small --pass backward": "--pass: 'backward' is not known; did you mean forward+backward? allowed are ...",
    "gpt2-small --against flash": "--against: 'flash' is not known; allowed are attention, window, linear, "
    + ", ".join(BESIDE)
    + ", none",
    "gpt2-small --impl tritn": "--impl: 'tritn' is not known; did you mean triton? allowed are auto, torch, ...",
    "gpt2-small --device tpu": "--device: 'tpu' is not known; did you mean cpu? allowed are auto, cpu, cuda, cuda:1",
    "gpt2-small --dtype fp8": "--dtype: 'fp8' is not a dtype that layers run in; ...",
    "gpt2-small --dtype int4": "--dtype: 'int4' is not a dtype that layers run in; allowed are fp32, bf16, fp16",
    "gpt2-small --batch 0": "--batch: 0 is out of range; allowed are 1 to 65,536",
    "gpt2-small --chunk-size 0": "--chunk-size: 0 is out of range; allowed are 1 to 1,048,576",
    "gpt2-small --chunk-size big": "--chunk-size: 'big' is not an integer; write a number or a list such as 2,3,4",
    "gpt2-small --time-limit 0": "--time-limit: '0' is out of range; allowed are 1 s to 24 h",
    "gpt2-small --time-limit soon": "--time-limit: 'soon' is not a time; write 90 (seconds), 5min or 1h",
    "gpt2-small --memory-limit 0": "--memory-limit: '0' is out of range; allowed are 1 byte to 2^80",
    "gpt2-small --save .": "--save: . is a folder; give a file",
    "gpt2-small --save nowhere/x.json": "--save: nowhere/x.json: there is no folder nowhere",
    "gpt2-small --plot x.gif": "--plot: x.gif must end in .png, .svg, .pdf",
    "--show none.json": "none.json: no such file",
    "gpt2-small --show none.json": "--show: prints a saved profile: leave MODEL out",
    "--show none.json --ctx 1k": "--show: prints a saved profile: leave --ctx out",
    "--show none.json --time-limit 60 --p 2": "--show: prints a saved profile: leave --p and --time-limit out",
    "--show none.json --breakdown gpt2-small --pass decode": (
        "--show: prints a saved profile: leave MODEL, --pass and --breakdown out"
    ),
    "--show none.json --save x.json --force --format csv": "--show: prints a saved profile: leave --save out",
    "--show none.json --plot x.png --force --format csv": "none.json: no such file",
    "gpt2-smal": "'gpt2-smal' is neither a file nor a built-in model; ...",
}


@pytest.mark.parametrize("options", COMMANDS, ids=lambda text: text[:60])
def test_options(
    expect_refusal: Callable[[list[str], str], None], options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expect_refusal(["profile", *options.split()], COMMANDS[options])
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_version(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.json").write_text(json.dumps({"schema": "powerplan.profile/9"}))
    expect_refusal(["profile", "--show", "p.json"], "--show: p.json is of schema 'powerplan.profile/9'; wanted is ...")


def test_an_existing_file_is_kept(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.json").write_text("mine")
    expect_refusal(["profile", "--save", "p.json"], "--save: p.json exists; --force overwrites it")
    assert Path("p.json").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU lacks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device cuda", "--device cuda: torch finds no CUDA device here; --device cpu runs on the processor"),
        ("--impl triton --p 2 --ctx 64", "power p=2 (triton): impl='triton' "),
    ],
)
def test_what_this_machine_cannot_do(
    options: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["profile", "gpt2-small", *options.split()]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
    assert line.startswith(f"error: {message}")


def test_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["profile", "gpt2-small"]) == 4
    assert capsys.readouterr().err == "error: profile: needs torch, and it is not installed: pip install torch\n"
