"""The example of docs/models.md runs and prints what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = (Path(__file__).resolve().parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    said = [re.search(r"# ([\d ]+)", line) for line in block.splitlines() if line.startswith("print")]
    assert capsys.readouterr().out.splitlines() == [match[1].strip() for match in said if match]
    assert list(names["answer"].shape) == [1, 5]  # type: ignore[attr-defined]
