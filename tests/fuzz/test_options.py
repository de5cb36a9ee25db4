"""Random mixtures of valid and hostile options of every command: an answer, or one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from fuzzing import PROFILE, VALUES, ends_well, fuzz, hostile_words
from hypothesis import given
from hypothesis import strategies as st

from powerplan.cli import profile as profile_command
from powerplan.cli.app import COMMANDS, application
from powerplan.profile import load_profile

GROUP: Any = typer.main.get_command(application())
PARAMETERS: dict[str, list[Any]] = {name: GROUP.commands[name].params for name in COMMANDS}

SLOW = ("recommend", "report", "reproduce", "doctor")
"""Commands whose answers take 0.1 s and more."""


def test_every_option_has_values_here() -> None:
    """A new option takes part in the fuzzing."""
    names = {name_of(parameter) for parameters in PARAMETERS.values() for parameter in parameters}
    assert names == set(VALUES)


def name_of(parameter: Any) -> str:
    """Return --option, or the name of an argument."""
    return str(parameter.opts[0])


@st.composite
def command_lines(draw: st.DrawFn, names: list[str], hostility: int = 8) -> list[str]:
    """A command with some of its options; one value in `hostility` is hostile."""
    name = draw(st.sampled_from(names))
    words = [name]
    options = [parameter for parameter in PARAMETERS[name] if parameter.param_type_name == "option"]
    for parameter in draw(st.lists(st.sampled_from(options), max_size=6, unique=True)) if options else []:
        words += draw(written(parameter, hostility))
    for argument in [parameter for parameter in PARAMETERS[name] if parameter.param_type_name == "argument"]:
        count = draw(st.sampled_from([1, 1, 1, 1, 0, 2] if argument.nargs == 1 else [2, 2, 3, 1, 0]))
        words += [draw(value(argument, hostility)) for _ in range(count)]
    if draw(st.integers(0, 20)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(hostile_words))
    return words


@st.composite
def written(draw: st.DrawFn, parameter: Any, hostility: int) -> list[str]:
    """An option and its value, as one word or as two."""
    name = draw(st.sampled_from([word for word in parameter.opts if word.startswith("--")] or parameter.opts))
    if not VALUES[name_of(parameter)]:
        return [name]
    chosen = draw(value(parameter, hostility))
    return draw(st.sampled_from([[name, chosen], [name, chosen], [f"{name}={chosen}"]]))


@st.composite
def value(draw: st.DrawFn, parameter: Any, hostility: int) -> str:
    if draw(st.integers(1, hostility)) == hostility:
        return draw(hostile_words)
    return draw(st.sampled_from(VALUES[name_of(parameter)]))


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Go to an empty folder, and let profile measure nothing."""
    folder, measured = tmp_path_factory.mktemp("options"), load_profile(str(PROFILE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(profile_command, "_measured", lambda session, signals: measured)
        yield folder


@pytest.fixture(autouse=True)
def nothing_left(workplace: Path) -> Iterator[None]:
    yield
    assert not list(workplace.glob(".powerplan-*"))


@fuzz(400)
@given(words=command_lines([name for name in COMMANDS if name not in SLOW]))
def test_quick_commands(words: list[str]) -> None:
    ends_well(words)


@fuzz(40)
@given(words=command_lines(list(SLOW)))
def test_slow_commands(words: list[str]) -> None:
    ends_well(words)


@fuzz(100)
@given(words=st.lists(hostile_words | st.sampled_from([*COMMANDS, "--version", "-h", *VALUES]), max_size=4))
def test_any_words(words: list[str]) -> None:
    ends_well(words)
