"""The examples run, and say something true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from powerplan.accounting import Accounting
from powerplan.load import load_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_plan_from_config() -> None:
    command = [sys.executable, EXAMPLES / "plan_from_config.py", "llama-3-8b", "64k"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "llama-3-8b at 65,536 tokens" in out
    assert "power:p=2    WSFR   5.51:1" in out


def test_the_hybrid_spec() -> None:
    loaded = load_model(EXAMPLES / "hybrid.yaml")
    accounting = Accounting(loaded.spec)
    assert [use.count for use in accounting.uses] == [12, 4]
    assert accounting.wsfr(65_536) == pytest.approx(5.705, rel=1e-3)


def test_train_icl_says_what_it_takes() -> None:
    """What it does is held by tests/test_train_icl.py."""
    command = [sys.executable, EXAMPLES / "train_icl.py", "--help"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "--mixers LIST" in out


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(path.name in text for path in EXAMPLES.iterdir() if path.is_file())
