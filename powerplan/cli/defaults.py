"""Defaults from a file, put in place of options that are not on the command line."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import typer

from powerplan.cli import say
from powerplan.defaults import Defaults, Value, find_defaults, listed_value, written
from powerplan.errors import InputError, allowed_values, listed, unknown_word

FILES = frozenset({"--write", "--plot", "--save", "--show", "--output", "--measured", "--lengths"})
"""Options that name a file, or may: none has a default."""

OWN_TABLE_ALONE = frozenset({"profile"})
"""Commands that take no shared defaults: what to measure here is another question than what to plan for."""

OF_A_DEVICE = frozenset({"devices", "mfu", "price"})
"""Defaults that are taken where a device is named: commands refuse these options without one."""


@dataclass
class Taken:
    """The defaults that a command has taken.

    places: where each stands, by the spellings of its option. texts: each as a note says it. left: lists that the
    command has one value for.
    """

    places: dict[str, str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    file: str = ""


_taken: ContextVar[Taken | None] = ContextVar("taken", default=None)


def is_default(option: str) -> bool:
    """Whether an option such as "--gpu" has a value from a file, and none from the command line."""
    taken = _taken.get()
    return taken is not None and option in taken.places


def take_defaults(
    context: typer.Context,
    commands: Collection[str],
    values: dict[str, Any],
    words: Mapping[str, Collection[str]],
    lists: Collection[str],
) -> Taken:
    """Put the defaults of a file into `values`, for the options that are not on the command line.

    Args:
        context: That of the command.
        commands: The names of all commands.
        values: The parameters of the command by name, as lists of what they were given.
        words: The words that a parameter may be, for those that are one of some.
        lists: Parameters that hold several values.

    Raises:
        InputError: The file is wrong, or a default cannot be one of this command.
    """
    command = str(context.info_name)
    defaults, taken = find_defaults(list(commands)), Taken()
    if not defaults.file:
        return taken
    taken.file = defaults.file
    parameters = {
        parameter.opts[0].removeprefix("--"): parameter
        for parameter in context.command.params
        if parameter.param_type_name == "option"
        and parameter.opts[0] not in FILES
        and isinstance(values.get(str(parameter.name), False), list | None)
    }
    entries = list(_entries(defaults, command))
    has_device = "gpu" in {key for _, key, _ in entries} or bool(values.get("gpu"))
    for table, key, value in entries:
        where = defaults.place(key, table)
        if key not in parameters:
            if table:
                raise InputError(f"unknown key{allowed_values(key, list(parameters))}", where)
            continue
        if key in OF_A_DEVICE and not has_device:
            continue
        parameter = parameters[key]
        name = str(parameter.name)
        if _given(context, name) or not _has_place(command, key, value, values):
            continue
        several = value if isinstance(value, list) else [value]
        if name not in lists and len(several) > 1:
            if table:
                raise InputError("takes one value, and this is a list", where)
            taken.left.append(key)
            continue
        values[name] = [written(one) for one in several]
        for word in values[name]:
            if name in words and word not in words[name]:
                raise InputError(f"{unknown_word(word, list(words[name]))}{_of(command, table)}", where)
        taken.places |= dict.fromkeys(parameter.opts, where)
        taken.texts.append(f"{key} {listed_value(value)}")
    return taken


def _entries(defaults: Defaults, command: str) -> Iterator[tuple[str, str, Value]]:
    """Yield the table, key and value of each default of a command; "" is the table that all commands share."""
    own = defaults.commands.get(command, {})
    if command not in OWN_TABLE_ALONE:
        for key, value in defaults.shared.items():
            if key not in own:
                yield "", key, value
    for key, value in own.items():
        yield command, key, value


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _has_place(command: str, key: str, value: Value, values: Mapping[str, Any]) -> bool:
    """Whether a default has a meaning beside the options that are on the command line."""
    if key == "format":
        return not (values.get("json_") or values.get("yaml") or (values.get("explain") and value == "csv"))
    return not (command == "dims" and key == "ctx" and not values.get("model"))


def _of(command: str, table: str) -> str:
    """Return the end of a message about a default that all commands share, and this one cannot take."""
    return "" if table else f" for {command}; a table of its own, [{command}], comes before it"


@contextmanager
def using(taken: Taken) -> Iterator[None]:
    """Say which defaults were taken, and let errors about them name their place in the file."""
    if taken.texts or taken.left:
        left = [f"not {listed(taken.left, 'or')}, which is a list here"] if taken.left else []
        say.note(f"defaults of {taken.file}: {'; '.join([*taken.texts, *left])}")
    token = _taken.set(taken)
    try:
        yield
    except InputError as error:
        place = taken.places.get((error.where or "").split(" ")[0])
        if place is None:
            raise
        raise InputError(error.problem, place) from None
    finally:
        _taken.reset(token)
