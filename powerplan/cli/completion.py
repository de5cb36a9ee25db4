"""What a shell asks for when a word is to be completed, and the words that it gets.

A shell asks through environment variables, which typer takes for granted. Bash divides words at ":" and "=", so that
`--mixer power:p` are five words; they are joined before typer sees them, and bash gets back the last part alone.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal, get_args, get_origin, get_type_hints

from powerplan.choices import LM_HEAD
from powerplan.errors import InputError, check_word

VARIABLE = "_POWERPLAN_COMPLETE"
"""What the script of `powerplan --show-completion` sets."""

SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")
ACTIONS = ("complete", "source")

Words = Callable[[str], list[str]]
"""What typer calls: the words that may stand in place of one that has been begun."""


@contextmanager
def requested() -> Iterator[None]:
    """Answer the request of a shell inside a `with` block, which calls typer.

    Raises:
        InputError: The variables are not as a shell's completion script sets them.
    """
    check_request(os.environ)
    if os.environ[VARIABLE] != "complete_bash":
        yield
        return
    asked = {name: os.environ[name] for name in ("COMP_WORDS", "COMP_CWORD")}
    words, position = _joined(
        asked["COMP_WORDS"].split("\n" if "\n" in asked["COMP_WORDS"] else " "), int(asked["COMP_CWORD"])
    )
    os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(position)}
    begun = words[position] if position < len(words) else ""
    kept = re.match(r".*[:=]", begun)
    answer = io.StringIO()
    try:
        with redirect_stdout(answer):
            yield
    finally:
        os.environ |= asked
        lines = answer.getvalue().splitlines(keepends=True)
        sys.stdout.write("".join(line.removeprefix(kept[0]) if kept else line for line in lines))


def check_request(environment: Mapping[str, str]) -> None:
    """Raise InputError unless the variables are as a shell's completion script sets them."""
    request = environment[VARIABLE]
    known = [f"{action}_{shell}" for action in ACTIONS for shell in SHELLS]
    check_word(request, known, VARIABLE)
    if request == "complete_bash":
        words, position = environment.get("COMP_WORDS"), environment.get("COMP_CWORD")
        if words is None or position is None or not (position.isdecimal() and len(position) < 6):
            problem = "complete_bash needs COMP_WORDS and a number in COMP_CWORD, as the script sets them that"
            raise InputError(f"{problem} powerplan --show-completion prints", VARIABLE)


def _joined(words: list[str], position: int) -> tuple[list[str], int]:
    """Return the words of a command line as they were written, and the place of the one at `position` among them."""
    joined: list[str] = []
    glue = False
    for place, word in enumerate(words):
        divides = bool(word) and not word.strip(":=")
        if joined and (glue or divides):
            joined[-1] += word
        else:
            joined.append(word)
        glue = divides
        if place == position:
            found = len(joined) - 1
    return joined, found if position < len(words) else position - len(words) + len(joined)


def completer(names: Callable[[], Iterable[str]]) -> Words:
    """Return a completion for typer: those of `names` that begin with what has been typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete.lower())]

    return complete


def list_completer(names: Callable[[], Iterable[str]]) -> Words:
    """Return a completion of the last part of a list such as "power,window", with names that it has not got yet."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names() if name.startswith(last) and name not in before.split(",")]

    return complete


def mixer_words(incomplete: str) -> list[str]:
    """Return the mixers that begin with what has been typed, or the settings of the one that is there."""
    from powerplan.mixers import MIXERS

    kind, colon, settings = incomplete.partition(":")
    if not colon:
        names = ["power:p=2" if name == "power" else name for name in sorted(MIXERS)]
        return [name for name in [*names, "window:4096"] if name.startswith(kind)]
    if kind == "window":
        return [word for word in ("window:1k", "window:4k", "window:16k") if word.startswith(incomplete)]
    if kind not in MIXERS:
        return []
    before, comma, last = settings.rpartition(",")
    field, equals, _ = last.partition("=")
    set_already = {part.partition("=")[0] for part in before.split(",")}
    hints = get_type_hints(MIXERS[kind], include_extras=True)
    fields = [name for name in sorted(MIXERS[kind].__struct_fields__) if name not in set_already]
    if equals:
        candidates = [f"{field}={value}" for value in _values(field, hints.get(field))]
    else:
        candidates = [f"{name}={value}" for name in fields if name == "p" for value in _values(name, None)]
        candidates += [f"{name}=" for name in fields if name != "p"]
    return [f"{kind}:{before}{comma}{candidate}" for candidate in candidates if candidate.startswith(last)]


def _values(field: str, hint: Any) -> list[str]:
    """Return the words that a field of a mixer may be; small degrees for p, nothing for other numbers."""
    if field == "p":
        return ["1", "2", "3", "4"]
    if hint is bool:
        return ["true", "false"]
    if get_origin(hint) is Literal:
        return [str(word).lower() for word in get_args(hint)]
    return [word for inner in get_args(hint) for word in _values("", inner)]


def family_names() -> Iterable[str]:
    """Return the families of config.json."""
    from powerplan.huggingface import FAMILIES

    return sorted(FAMILIES)


def device_names() -> Iterable[str]:
    """Return the names of devices."""
    from powerplan.hardware import devices  # Only a completion needs it: planning without a device loads no rates.

    return devices()


def selectable_kinds() -> Iterable[str]:
    """Return the words of --only."""
    from powerplan.search import SELECTABLE

    return SELECTABLE


def excludable_kinds() -> Iterable[str]:
    """Return the words of recommend's --exclude."""
    return [*selectable_kinds(), LM_HEAD]


def state_kinds() -> Iterable[str]:
    """Return the words of dims --kind."""
    from powerplan.report.dims import KINDS

    return [*KINDS, "all"]
