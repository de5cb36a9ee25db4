"""`--mixer KIND` for every kind on every model of the catalogue."""

from __future__ import annotations

import pytest
from kinds import KINDS

from powerplan.cli import main
from powerplan.load import catalogue_names

SETTINGS = {"power": "power:p=2"}
"""Kinds that need a setting."""


def answered(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """Run a command that has an answer, and return its notes."""
    code = main(command.split())
    out, err = capsys.readouterr()
    assert (code, bool(out)) == (0, True), f"{command}: {err}"
    assert all(line.startswith(("note: ", "  ")) for line in err.splitlines()), err
    return err


@pytest.mark.parametrize("kind", KINDS)
def test_wsfr_with_every_kind_on_every_model(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in catalogue_names():
        answered(capsys, f"wsfr {name} --mixer {SETTINGS.get(kind, kind)} --ctx 64k --format json")


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_other_commands_with_every_kind(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind on two models of its own, as far as models go."""
    names = catalogue_names()
    kind = SETTINGS.get(KINDS[number], KINDS[number])
    for command in (
        f"budget {names[2 * number % len(names)]} --ctx 64k",
        f"decode {names[(2 * number + 1) % len(names)]}",
    ):
        answered(capsys, f"{command} --mixer {kind}")
