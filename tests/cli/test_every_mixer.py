"""`--mixer KIND` for every kind on every model of the catalogue: an answer, or one line that says why there is none."""

from __future__ import annotations

import pytest
from kinds import KINDS

from powerplan.cli import main
from powerplan.load import catalogue_names

SETTINGS = {"power": "power:p=2"}
"""Kinds that need a setting."""


def ended(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Run a command that answers with exit code 0, or refuses with 2 or 3 and one message."""
    code = main(command.split())
    out, err = capsys.readouterr()
    assert code in (0, 2, 3), command
    assert (code == 0) == bool(out), command
    assert "Traceback" not in err, err
    if code:
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err


@pytest.mark.parametrize("kind", KINDS)
def test_wsfr_with_every_kind_on_every_model(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in catalogue_names():
        ended(capsys, f"wsfr {name} --mixer {SETTINGS.get(kind, kind)} --ctx 64k --format json")


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_other_commands_with_every_kind(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind on two models, and all models among them but a few."""
    names = catalogue_names()
    kind = SETTINGS.get(KINDS[number], KINDS[number])
    for command in (
        f"budget {names[2 * number % len(names)]} --ctx 64k",
        f"decode {names[(2 * number + 1) % len(names)]}",
    ):
        ended(capsys, f"{command} --mixer {kind}")
