"""docs/cli.md: its example runs, its file is one of defaults, and it names every shared option and key."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from powerplan.cli import main
from powerplan.cli.app import COMMANDS
from powerplan.cli.shared import JSON, NO_COLOR, OUTPUT, QUIET
from powerplan.defaults import OPTIONS, find_defaults

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def test_the_example_of_standard_input() -> None:
    (block,) = re.findall(r"```console\n\$ (.*?)```", PAGE, re.DOTALL)
    command, first, _ = block.split("\n", 2)
    command = command.replace("powerplan", f"'{Path(sys.executable).with_name('powerplan')}'", 1)
    command = command.replace("| powerplan", f"| '{Path(sys.executable).with_name('powerplan')}'")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(first)
    assert done.stderr == ""


def test_the_file_of_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    Path("powerplan.toml").write_text(text)
    assert find_defaults(list(COMMANDS)).listed() == [
        ("ctx", "8k,128k"),
        ("gpu", "h100-sxm"),
        ("devices", "64"),
        ("price", "2.5"),
        ("train ctx", "8k"),
    ]
    assert main(["train", "llama-3-8b", "--tokens", "1B"]) == 0
    assert main(["wsfr", "llama-3-8b"]) == 0
    assert main(["recommend", "llama-3-8b"]) == 0


def test_options_and_keys_are_named() -> None:
    for option in (JSON, OUTPUT, QUIET, NO_COLOR):
        info = option.__metadata__[0]
        assert all(f"`{name}" in PAGE for name in (info.default, *info.param_decls))
    (keys,) = re.findall(r"outside the table of a command: (.*?)\. A command", PAGE, re.DOTALL)
    assert re.findall(r"`(.*?)`", keys) == list(OPTIONS)
