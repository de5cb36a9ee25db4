"""Files that were once read wrongly (tests/data/cases), each with what transformers builds of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from powerplan.accounting import Accounting
from powerplan.load import load_model

CASES = Path(__file__).parent.parent / "data" / "cases"
EXPECTED: dict[str, dict[str, Any]] = json.loads((CASES / "expected.json").read_text(encoding="utf-8"))


def test_every_case_has_an_expectation() -> None:
    assert {path.name for path in CASES.glob("*.json")} - {"expected.json"} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_case(name: str) -> None:
    expected, loaded = EXPECTED[name], load_model(CASES / name)
    accounting = Accounting(loaded.spec)
    assert accounting.total_parameters.with_embeddings == expected["parameters"]
    for note in expected["notes"]:
        assert any(note in text for text in loaded.notes), loaded.notes
    quantization = loaded.spec.quantization
    assert (quantization and quantization.method) == expected.get("quantization")
    if "cache_elements_at_2048" in expected:
        assert accounting.row(2048).state_elements == expected["cache_elements_at_2048"]
