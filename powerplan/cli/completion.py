"""What a shell asks for when a word is to be completed: environment variables, which typer takes for granted."""

from __future__ import annotations

from collections.abc import Mapping

from powerplan.errors import InputError, allowed_values, shown

VARIABLE = "_POWERPLAN_COMPLETE"
"""What the script of `powerplan --show-completion` sets."""

SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")
ACTIONS = ("complete", "source")


def check_request(environment: Mapping[str, str]) -> None:
    """Raise InputError unless the variables are as a shell's completion script sets them."""
    request = environment[VARIABLE]
    known = [f"{action}_{shell}" for action in ACTIONS for shell in SHELLS]
    if request not in known:
        raise InputError(f"{shown(request)} is not known{allowed_values(request, known)}", VARIABLE)
    if request == "complete_bash":
        words, position = environment.get("COMP_WORDS"), environment.get("COMP_CWORD")
        if words is None or position is None or not (position.isdecimal() and len(position) < 6):
            problem = "complete_bash needs COMP_WORDS and a number in COMP_CWORD, as the script sets them that"
            raise InputError(f"{problem} powerplan --show-completion bash prints", VARIABLE)
