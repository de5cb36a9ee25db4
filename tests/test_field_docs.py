"""docs/field.md: made by its script, with kinds, models and commands that there are, and a row for every system."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from powerplan.cli import main
from powerplan.ffn import FFNS
from powerplan.load import catalogue_names
from powerplan.mixers import MIXERS
from powerplan.reproduce import figure_sets

ROOT = Path(__file__).resolve().parent.parent
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "field_docs.py"))
SYSTEMS: tuple[Any, ...] = SCRIPT["SYSTEMS"]


def test_the_page_is_made_by_its_script() -> None:
    """Where an output has changed on purpose, `python scripts/field_docs.py` writes the page anew."""
    assert (ROOT / "docs" / "field.md").read_text(encoding="utf-8") == SCRIPT["field_page"]()


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_system_is_counted_by_what_there_is(system: Any) -> None:
    kinds = [kind for kind in system.kinds if not kind.startswith("--")]
    assert set(kinds) <= {*MIXERS, *FFNS}
    assert set(system.models) <= set(catalogue_names())
    assert all(option in system.command for option in system.kinds if option.startswith("--"))


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_its_command_shows_it(system: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(system.command)
    assert program == "powerplan"
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out
    assert "Traceback" not in said.err


def test_every_claim_has_a_row() -> None:
    claims = figure_sets()["field"]
    shown = {key for system in SYSTEMS for name, key in system.figures if name == "field"}
    assert shown == {figure.key for figure in claims.figures}
    assert {system.open for system in SYSTEMS if system.open} == set(claims.not_computed)


def test_every_kind_of_the_field_has_a_row() -> None:
    """The kinds that came with it: of FFNs all but the plain one."""
    counted = {kind for system in SYSTEMS for kind in system.kinds}
    assert {"hyena", "exponential_sparse", "span_search", "memory_sparse", "wersa", "sse", *FFNS} - {"mlp"} <= counted
