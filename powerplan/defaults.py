"""Defaults of the command line's options, from powerplan.toml or from [tool.powerplan] in pyproject.toml."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from powerplan.errors import InputError, allowed_values, shown
from powerplan.textfiles import read_text

Value = str | int | float | list[str | int | float]

OWN_FILE, PROJECT_FILE, TABLE = "powerplan.toml", "pyproject.toml", "tool.powerplan"

OPTIONS = (
    *("ctx", "batch", "target", "top", "form", "causal", "dtype", "weights-dtype", "cache-dtype", "state-dtype"),
    *("gpu", "devices", "mfu", "price", "format"),
)
"""Options whose defaults may stand outside the table of a command."""


_NAMED = re.compile(r"""\btool\b["']?\s*[.=][\s{]*["']?powerplan\b|^\s*["']?powerplan["']?\s*[.=]""", re.MULTILINE)
"""What a pyproject.toml holds where it may have the table, in any of TOML's spellings."""


@dataclass(frozen=True)
class Defaults:
    """What a file holds. An object without a file holds nothing.

    shared: the defaults of all commands. commands: those of one command each. lines: the line of each key, by its table
    and name, where "" is the table of the shared ones.
    """

    file: str = ""
    shared: Mapping[str, Value] = field(default_factory=dict)
    commands: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    lines: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def place(self, key: str, command: str = "") -> str:
        """Return where a default stands, as messages name it."""
        return f"{self.file}:{self.lines.get((command, key), 1)}: {key}"

    def listed(self) -> list[tuple[str, str]]:
        """Return the option and the value of each; the option of a command's table begins with the command."""
        return [
            (f"{command} {key}".strip(), listed_value(value))
            for command, table in (("", self.shared), *self.commands.items())
            for key, value in table.items()
        ]


def written(value: str | int | float) -> str:
    """Return a value as an option takes it."""
    return repr(value).replace("+", "") if isinstance(value, float) else str(value)


def listed_value(value: Value) -> str:
    """Return a value, or the values of a list, for people."""
    return ",".join(map(written, value if isinstance(value, list) else [value]))


def find_defaults(commands: Sequence[str]) -> Defaults:
    """Return the defaults of the nearest file, from the working directory up to the root of its repository.

    Where there is no repository only the working directory is looked at. powerplan.toml comes before pyproject.toml.

    Args:
        commands: The names that tables of commands may have.

    Raises:
        InputError: A file is not TOML, or a key or a value is none that it may hold. The message has its line.
    """
    for folder in map(Path, map(os.path.relpath, _folders())):
        own, project = folder / OWN_FILE, folder / PROJECT_FILE
        if _is_there(own, os.path.lexists):  # A folder or a link to nothing of this name is a mistake: reading says so.
            return _read(own, read_text(own, usual="defaults are a few lines"), "", commands)
        text = _text_of_project(project)
        if _NAMED.search(text):
            defaults = _read(project, text, TABLE, commands)
            if defaults.file:
                return defaults
    return Defaults()


def _text_of_project(path: Path) -> str:
    """Return what a pyproject.toml holds; "" where there is none, or it cannot be read: it may be another tool's."""
    try:
        return read_text(path) if _is_there(path) else ""
    except InputError:
        return ""


def _folders() -> list[Path]:
    try:
        here = Path.cwd()
    except OSError:  # It has been removed.
        return []
    folders = [here, *here.parents]
    root = next((place for place, folder in enumerate(folders) if _is_there(folder / ".git", Path.exists)), 0)
    return folders[: root + 1]


def _is_there(path: Path, ask: Callable[[Path], bool] = Path.is_file) -> bool:
    """Whether there is a file, as far as we may look."""
    try:
        return ask(path)
    except OSError:
        return False


def _read(path: Path, text: str, table: str, commands: Sequence[str]) -> Defaults:
    import tomllib  # Most folders have no such file.

    name = str(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem, _, place = str(error).partition(" (at ")
        at = re.fullmatch(r"line (\d+), column (\d+)\)", place)
        where = f"{name}:{at[1]}:{at[2]}" if at else f"{name}:{max(len(text.splitlines()), 1)}"  # At its end.
        raise InputError(f"is not valid TOML: {problem[:1].lower()}{problem[1:]}", where) from None
    except ValueError:  # CPython reads no integer of more than 4,300 digits.
        raise InputError("is not valid TOML: a number of thousands of digits", name) from None
    except RecursionError:
        raise InputError("is not valid TOML: too many lists or tables within each other", name) from None
    found: object = data
    for part in table.split(".") if table else ():
        found = found.get(part) if isinstance(found, dict) else None
    if found is None:
        return Defaults()
    defaults = Defaults(name, {}, {}, dict(_lines(text, table)))
    if not isinstance(found, dict):
        raise InputError(f"is {shown(found)}, and not a table", f"{name}: {table}")
    allowed = [*OPTIONS, *(f"[{command}]" for command in commands)]
    for key, value in found.items():
        if key in commands and isinstance(value, dict):
            continue
        if key not in OPTIONS:
            raise InputError(f"unknown key{allowed_values(key, allowed)}", defaults.place(key))
        _check(value, defaults.place(key))
    for command in commands:
        for key, value in found.get(command, {}).items():
            _check(value, defaults.place(key, command))
    shared = {key: value for key, value in found.items() if key in OPTIONS}
    return Defaults(name, shared, {key: found[key] for key in commands if key in found}, defaults.lines)


def _check(value: object, where: str) -> None:
    several = value if isinstance(value, list) else [value]
    for one in several:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise InputError(f"{shown(one)} is not text or a number, or a list of them", where)
    if not several:
        raise InputError("is an empty list", where)


def _lines(text: str, table: str) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield the keys of a TOML file, each with its table's command, and its line: tomllib tells no places."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line)
        if header:
            current = re.sub(r"[\s\"']", "", header[1])
            continue
        key = re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line)
        if key and current == table:
            yield ("", key[1]), number
        elif key and current.startswith(f"{table}." if table else ""):
            yield (current.removeprefix(f"{table}." if table else ""), key[1]), number
