"""Shell completion: what a shell asks for through environment variables, and what it gets where they are not set."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from powerplan.cli import main

NEEDS = "_POWERPLAN_COMPLETE: complete_bash needs COMP_WORDS and a number in COMP_CWORD, as the script sets them ..."
COMPLETIONS: list[tuple[dict[str, str], int, str]] = [
    ({"_POWERPLAN_COMPLETE": "complete_bash"}, 2, NEEDS),
    ({"_POWERPLAN_COMPLETE": "complete_bash", "COMP_WORDS": "powerplan "}, 2, NEEDS),
    ({"_POWERPLAN_COMPLETE": "complete_bash", "COMP_WORDS": "powerplan", "COMP_CWORD": "x"}, 2, NEEDS),
    ({"_POWERPLAN_COMPLETE": "complete_bash", "COMP_WORDS": "powerplan", "COMP_CWORD": "-1"}, 2, NEEDS),
    ({"_POWERPLAN_COMPLETE": "complete_bash", "COMP_WORDS": "powerplan", "COMP_CWORD": "9" * 5000}, 2, NEEDS),
    ({"_POWERPLAN_COMPLETE": "complete_bash", "COMP_WORDS": "powerplan ws", "COMP_CWORD": "1"}, 0, "wsfr"),
    (
        {"_POWERPLAN_COMPLETE": "complete_bash", "COMP_WORDS": "powerplan wsfr 'gpt2-sm", "COMP_CWORD": "2"},
        0,
        "gpt2-small",
    ),
    ({"_POWERPLAN_COMPLETE": "complete_bash", "COMP_WORDS": "", "COMP_CWORD": "7"}, 0, "wsfr..."),
    ({"_POWERPLAN_COMPLETE": "complete_zsh"}, 0, "_arguments '*: :((..."),
    ({"_POWERPLAN_COMPLETE": "complete_fish"}, 0, ""),
    ({"_POWERPLAN_COMPLETE": "complete_powershell"}, 0, "wsfr:::..."),
    ({"_POWERPLAN_COMPLETE": "complete_pwsh"}, 0, "wsfr:::..."),
    ({"_POWERPLAN_COMPLETE": "source_zsh"}, 0, "#compdef powerplan..."),
    (
        {"_POWERPLAN_COMPLETE": "complete_tcsh"},
        2,
        "_POWERPLAN_COMPLETE: 'complete_tcsh' is not known; did you mean ...",
    ),
    ({"_POWERPLAN_COMPLETE": "complete"}, 2, "_POWERPLAN_COMPLETE: 'complete' is not known; did you mean ..."),
    ({"_POWERPLAN_COMPLETE": "run_bash"}, 2, "_POWERPLAN_COMPLETE: 'run_bash' is not known; ..."),
    ({"_POWERPLAN_COMPLETE": "\x1b[2J"}, 2, r"_POWERPLAN_COMPLETE: '\x1b[2J' is not known; allowed are ..."),
]


@pytest.mark.parametrize(("variables", "code", "text"), COMPLETIONS, ids=lambda value: str(value)[22:50])
def test_completion(
    variables: dict[str, str], code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("COMP_WORDS", "COMP_CWORD", "_TYPER_COMPLETE_ARGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    answered = ending(main, [])
    captured = capsys.readouterr()
    assert answered == code
    said = captured.err if code else captured.out
    assert (captured.out if code else captured.err) == ""
    begin, dots, _ = (f"error: {text}" if code else text).partition("...")
    assert said.lstrip().startswith(begin)
    assert dots or said.strip() == begin


def ending(function: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Return an exit code, however `function` gives it."""
    try:
        return function(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0


WORDS = {
    "recommend --only po": ["power"],
    "recommend --only power,wi": ["power,window"],
    "recommend --only power,window,po": [],
    "recommend --exclude lm": ["lm-head"],
    "dims --kind kda,mamba2,al": ["kda,mamba2,all"],
    "wsfr gpt2-small --mixer pow": ["power:p=2"],
    "wsfr gpt2-small --mixer ka": [],
    "wsfr gpt2-small --mixer kd": ["kda"],
    "wsfr gpt2-small --mixer win": ["window:4096"],
    "wsfr gpt2-small --mixer window:": ["window:1k", "window:4k", "window:16k"],
    "wsfr gpt2-small --mixer power:p": ["power:p=1", "power:p=2", "power:p=3", "power:p=4"],
    "wsfr gpt2-small --mixer power:p=2,ga": ["power:p=2,gated="],
    "wsfr gpt2-small --mixer power:p=2,p": [],
    "wsfr gpt2-small --mixer power:p=2,gated=": ["power:p=2,gated=true", "power:p=2,gated=false"],
    "wsfr gpt2-small --mixer power:qk_norm=h": ["power:qk_norm=head"],
    "wsfr gpt2-small --mixer attention:bias=": [
        f"attention:bias={word}" for word in ("true", "false", "qkv", "output")
    ],
    "wsfr gpt2-small --mixer power:nothing=": [],
    "wsfr gpt2-small --mixer nothing:": [],
    "profile --mixer power:p=2,tile=": [],
    "decode gpt2-small --gpu h100-s": ["h100-sxm"],
}
"""What has been typed, and the words that fit."""


def completed(line: str, shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    words = ["powerplan", *line.split(" ")]
    monkeypatch.setenv("_POWERPLAN_COMPLETE", f"complete_{shell}")
    if shell == "bash":  # It divides words so, the dividing characters being words themselves.
        words = [part for word in words for part in re.split("([:=]+)", word)] if re.search("[:=]", line) else words
        words = [word for word in words[:-1] if word] + words[-1:]
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    else:
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(words))
        monkeypatch.setenv("_TYPER_COMPLETE_WORD_TO_COMPLETE", words[-1])
    assert ending(main, []) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return [word.partition(":::")[0] for word in captured.out.split()]


@pytest.mark.parametrize("line", WORDS)
def test_words_of_options(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = completed(line, "powershell", monkeypatch, capsys)
    assert [word.strip() for word in whole] == WORDS[line]
    last = re.sub(".*[:=]", "", line.split(" ")[-1])
    kept = line.split(" ")[-1].removesuffix(last)
    assert completed(line, "bash", monkeypatch, capsys) == [word.removeprefix(kept) for word in WORDS[line]]


def test_an_option_and_its_value_in_one_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed("decode gpt2-small --gpu=h100-s", "bash", monkeypatch, capsys) == ["h100-sxm"]
    assert completed("wsfr --mixer=power:p=2 gpt2-sm", "bash", monkeypatch, capsys) == ["gpt2-small"]


SCRIPT = Path(sys.executable).with_name("powerplan")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself() -> None:
    """The script of --show-completion, loaded by bash, which divides the words as it does for a user."""
    code = f"""
    PATH={SCRIPT.parent}:$PATH
    eval "$(powerplan --show-completion)"
    COMP_WORDS=(powerplan wsfr gpt2-small --mixer power : p = 2,gated = t) COMP_CWORD=10
    _powerplan_completion powerplan
    echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("true\n", "")
