"""Options that all commands share, and options that are given more than once."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from powerplan.cli import main
from powerplan.version import __version__

SCRIPT = Path(sys.executable).with_name("powerplan")

ADDED_UP = {
    "wsfr gpt2-small --ctx": "1k 16k",
    "compare gpt2-small gpt2-xl --ctx": "1k 16k",
    "budget gpt2-small --flops 1e21 --ctx": "1k 16k",
    "decode gpt2-small --ctx": "1k 16k",
    "decode gpt2-small --batch": "1 2",
    "recommend gpt2-small --ctx": "1k 16k",
    "recommend gpt2-small --only": "power window",
    "recommend gpt2-small --exclude": "lm-head power",
    "dims --head-dim": "64 128",
    "dims --p": "2 3",
    "dims --kind": "kda mamba2",
    "train llama-3-8b --gpu h100-sxm --devices 8 --parallel": "fsdp=4 tp=2",
    "train llama-3-8b --gpu h100-sxm --devices 64 --efficiency": "weights=0.6 attention=0.5",
}
"""Commands up to the option of a list, and two values of it."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ADDED_UP)
def test_values_of_a_list_add_up(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (*words, option), values = command.split(), ADDED_UP[command].split()
    together = printed(capsys, *words, option, ",".join(values), "--json")
    assert printed(capsys, *words, option, values[0], option, values[1], "--json") == together
    assert main([*words, option, values[0], "--json"]) in (0, 2)
    assert capsys.readouterr().out != together


def test_the_lists_of_profile_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    """Each second value is what the message is about: nothing is measured."""
    for option, first in {
        "--p": "2",
        "--ctx": "1k",
        "--pass": "train",
        "--against": "window",
        "--impl": "torch",
        "--chunk-size": "64",
    }.items():
        assert main(["profile", "gpt2-small", option, first, option, "zzz"]) == 2
        assert f"{option}: 'zzz' is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("wsfr gpt2-small --dtype bf16 --dtype fp8", "--dtype: takes one value, and got bf16 and fp8"),
        ("wsfr gpt2-small --by layer --by layer", "--by: takes one value, and got layer and layer"),
        ("decode gpt2-small --gpu h100-sxm --hardware a100", "--gpu: takes one value, and got h100-sxm and a100"),
        ("recommend --write a --write b --write c", "--write: takes one value, and got a, b and c"),
        ("train llama-3-8b --ctx 8k --ctx 16k", "--ctx: takes one value, and got 8k and 16k"),
        ("wsfr gpt2-small -o a -o b", "--output: takes one value, and got a and b"),
        (
            "wsfr gpt2-small --json --format csv",
            "--json: is --format json, and there is --format csv too; leave one out",
        ),
        (
            "wsfr gpt2-small --ctx 1k --ctx 65,536",
            "--ctx: '1k, 65,536' could be one context or several; write 65536, or ...",
        ),
        ("schema --json", "No such option: --json..."),
    ],
)
def test_what_is_refused(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    begin, dots, _ = message.partition("...")
    assert captured.out == ""
    assert captured.err.startswith(f"error: {begin}") if dots else captured.err == f"error: {message}\n"
    assert captured.err.count("\n") == 1


def test_json_is_a_short_form(capsys: pytest.CaptureFixture[str]) -> None:
    expected = printed(capsys, "dims", "--format", "json")
    assert printed(capsys, "dims", "--json") == expected
    assert printed(capsys, "dims", "--json", "--format", "json") == expected


def test_a_short_form_of_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "-V") == f"powerplan {__version__}\n"


@pytest.mark.parametrize("words", [["-q", "recommend"], ["recommend", "--quiet"], ["--quiet", "recommend", "-q"]])
def test_quiet_leaves_notes_out(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    expected = printed(capsys, "recommend")
    assert main(words) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (expected, "")


def test_quiet_keeps_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", "wsfr", "zzz", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: 'zzz' is neither")


def on_a_terminal(words: list[str]) -> bytes:
    """Return what a command prints on a terminal of many colours."""
    reader, writer = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    process = subprocess.Popen([SCRIPT, *words], stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    text = b""
    with suppress(OSError):  # Linux ends a terminal without a writer with an error.
        while piece := os.read(reader, 10_000):
            text += piece
    os.close(reader)
    process.wait()
    assert text.strip()
    return text


@pytest.mark.parametrize(
    "words",
    [
        ["--no-color", "wsfr", "zzz"],
        ["wsfr", "zzz", "--no-color"],
        ["wsfr", "--no-color", "--help"],
        ["wsfr", "gpt2-small", "--no-color"],
    ],
)
def test_no_color_is_for_all_that_is_printed(words: list[str]) -> None:
    assert b"\033[" in on_a_terminal([word for word in words if word != "--no-color"])
    text = on_a_terminal(words)
    assert b"\033[3" not in text  # The colours; help keeps bold letters, as with NO_COLOR.


def test_a_file_has_no_colours() -> None:
    assert on_a_terminal(["wsfr", "gpt2-small", "-o", "result"])
    assert "\033" not in Path("result").read_text(encoding="utf-8")


def test_no_color_ends_with_its_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed(capsys, "dims", "--no-color")
    assert "NO_COLOR" not in os.environ


@pytest.mark.parametrize(
    "command",
    [
        "wsfr gpt2-small",
        "wsfr gpt2-small --json",
        "dims --format csv",
        "models gpt2-small --yaml",
        "schema",
        "doctor --json",
    ],
)
def test_the_result_goes_to_a_file(command: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    expected = printed(capsys, *command.split())
    assert main([*command.split(), "-o", "result"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "note: wrote result\n")
    assert Path("result").read_text(encoding="utf-8") == expected
    assert [path.name for path in folder.iterdir()] == ["result"]
    assert main([*command.split(), "--output=result"]) == 2
    assert capsys.readouterr().err == "error: --output: result exists; --force overwrites it\n"
    assert main([*command.split(), "--output", "result", "--force", "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert printed(capsys, *command.split(), "-o", "-") == expected


def test_a_file_is_as_wide_as_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "gpt2-small", "deepseek-v3"]
    expected = printed(capsys, *command)
    monkeypatch.setattr("powerplan.cli.dispatch.columns", lambda: 60)
    assert printed(capsys, *command) != expected
    printed(capsys, *command, "-o", "result")
    assert Path("result").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("wsfr m.yaml -o m.yaml --force", "--output: m.yaml is the file that MODEL reads; give another"),
        (
            "compare gpt2-xl m.yaml -o m.yaml --force",
            "--output: m.yaml is the file that MODEL m.yaml reads; give another",
        ),
        ("recommend m.yaml --write out -o out", "--write: out is the file of --output too; give two files"),
        ("recommend m.yaml --plot out.png -o out.png", "--plot: out.png is the file of --output too; give two files"),
        ("budget --tokens 1 --measured m.yaml -o m.yaml --force", "--output: m.yaml is the file that --measured ..."),
        ("wsfr m.yaml -o none/x", "--output: none/x: there is no folder none"),
        ("wsfr m.yaml -o .", "--output: . is a folder; give a file"),
        ("wsfr zzz -o out", "'zzz' is neither ..."),
    ],
)
def test_files_that_are_refused(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "models", "gpt2-small", "--yaml", "-o", "m.yaml")
    before = Path("m.yaml").read_bytes()
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message.removesuffix('...')}")
    assert Path("m.yaml").read_bytes() == before
    assert [path.name for path in Path().iterdir()] == ["m.yaml"]


def test_both_files_of_a_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "gpt2-small", "--ctx", "64k", "--write", "new.yaml", "-o", "result.json", "--json"]) == 0
    captured = capsys.readouterr()
    assert [line.partition(":")[0] for line in captured.err.splitlines()] == ["note", "note"]
    assert json.loads(Path("result.json").read_text(encoding="utf-8"))["context"] == 65_536
    assert Path("new.yaml").exists()


def test_a_plan_that_nothing_meets_leaves_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "gpt2-small", "--max-state", "1", "-o", "out"]) == 3
    assert not Path("out").exists()
