"""The contract of bad input, checked through the command line's own entry point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from powerplan.cli import main

Refuses = Callable[[list[str], str], None]
Spec = Callable[[str | bytes], list[str]]


@pytest.fixture
def expect_refusal(capsys: pytest.CaptureFixture[str]) -> Refuses:
    """Run a command that must end with 2, nothing on stdout and one line on stderr: "error: " and the message.

    A message that ends with "..." is the beginning of the expected one.
    """

    def run(arguments: list[str], message: str) -> None:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.split("\n")[:-1]
        assert line.isprintable()
        assert "Traceback" not in line
        if message.endswith("..."):
            assert line.startswith(f"error: {message[:-3]}")
        else:
            assert line == f"error: {message}"

    return run


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """Write model.yaml in the working directory, and return the command that reads it."""

    def write(content: str | bytes) -> list[str]:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "model.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["wsfr", "model.yaml", "--ctx", "1k"]

    return write
