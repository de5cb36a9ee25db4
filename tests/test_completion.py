"""Shell completion: what a shell asks for through environment variables, and what it gets where they are not set."""

from __future__ import annotations

from collections.abc import Callable

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
