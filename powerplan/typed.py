"""Documents as msgspec structs other than specs: what is wrong, in one message with its place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin

import msgspec

from powerplan.documents import Document, Node, Step, parse_yaml
from powerplan.errors import InputError, allowed_values, did_you_mean, shown
from powerplan.validation import (
    MISSING_FIELD,
    OWN_CHECK,
    UNKNOWN_FIELD,
    dotted,
    plain_problem,
    split_message,
    value_at,
)

T = TypeVar("T")

MAX_INTEGER = 2**63 - 1
"""Largest magnitude of an integer: msgspec reports larger ones without their place."""


def converted(document: Document, kind: type[T], at: Sequence[Step] = ()) -> T:
    """Return the value at the path `at` of a document as `kind`, a msgspec struct.

    Raises:
        InputError: With file:line:column of the first mistake.
    """
    data = value_at(document.data, at)
    if not isinstance(data, dict):
        raise problem_at(document, at, f"{shown(data)} is not a mapping")
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise _located(str(error), document, kind, at) from None


def problem_at(document: Document, path: Sequence[Step], problem: str) -> InputError:
    """Return the error for a problem of the value at `path`."""
    return InputError(f"{dotted(path)}: {problem}" if path else problem, document.where(path))


def check_scalars(document: Document) -> None:
    """Raise InputError for the first text of a document with a character that does not print, keys included, and for a
    number that is not finite, or an integer of more than 63 bits."""
    for path, value in _scalars(document.root):
        if isinstance(value, str):
            bad = next((character for character in value if not character.isprintable()), None)
            if bad is not None:
                raise problem_at(document, path, f"holds a character that does not print, {shown(bad)}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise problem_at(document, path, f"{shown(value)} is not a finite number")
        elif isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise problem_at(document, path, f"{shown(value)} is out of range")


def _scalars(node: Node, path: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """Yield every scalar and every key of a document with its path."""
    if not isinstance(node.value, (dict, list)):
        yield path, node.value
    for step, child in node.children.items():
        if isinstance(step, str):
            yield (*path, step), step
        yield from _scalars(child, (*path, step))


def _located(message: str, document: Document, kind: type, at: Sequence[Step]) -> InputError:
    """Return the error for a message of msgspec's about the value at `at`, at its place in the document."""
    own = value_at(document.data, at)
    text, path = split_message(message, own)
    fields = _fields(kind, path)
    if field := UNKNOWN_FIELD.match(text):
        where = document.where([*at, *path, field[1]], at_key=True)
        problem = f"unknown key{allowed_values(field[1], sorted(fields))}"
        return InputError(f"{dotted([*at, *path, field[1]])}: {problem}", where)
    if field := MISSING_FIELD.match(text):
        given = value_at(own, path)
        near = did_you_mean(field[1], [key for key in given if key not in fields]) if isinstance(given, dict) else ""
        return InputError(f"{dotted([*at, *path, field[1]])}: is missing{near}", document.where([*at, *path]))
    if (field := OWN_CHECK.match(text)) and field[1] in fields:
        text = field[2]
        path += [field[1]] if field[1] in (value_at(own, path) or {}) else []
    words = [str(word) for option in _options(kind, path) if get_origin(option) is Literal for word in get_args(option)]
    return problem_at(document, [*at, *path], plain_problem(text, value_at(own, path), words))


def _options(kind: Any, path: Sequence[Step]) -> list[Any]:
    """Return the types that the value at `path` of a `kind` may have, those of a list's values included."""
    options = _flat(kind)
    for step in path:
        if isinstance(step, str):
            fields = [field for option in options for field in _struct_fields(option) if field.encode_name == step]
            options = [inner for field in fields for inner in _flat(field.type)]
    return options


def _fields(kind: Any, path: Sequence[Step]) -> list[str]:
    """Return the keys that the mapping at `path` of a `kind` may have."""
    return [field.encode_name for option in _options(kind, path) for field in _struct_fields(option)]


def _struct_fields(kind: Any) -> Sequence[Any]:
    return msgspec.structs.fields(kind) if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else ()


def _flat(kind: Any) -> list[Any]:
    """Return the alternatives of a union, the values of a list, and what Annotated holds; Literal as a whole."""
    if get_origin(kind) is None or get_origin(kind) is Literal:
        return [kind]
    return [inner for argument in get_args(kind) for inner in _flat(argument)]


class Named(Protocol):
    """Any row with a name."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


def packaged_rows(name: str, key: str, kind: type[Row]) -> dict[str, Row]:
    """Return the rows under `key` of a YAML file that comes with powerplan, by their names. Raises InputError."""
    return rows_of(parse_yaml((files("powerplan") / name).read_text(encoding="utf-8"), name), key, kind)


def rows_of(document: Document, key: str, kind: type[Row]) -> dict[str, Row]:
    """Return the rows under `key` of a document by their names; InputError for a wrong one, and for two of one name."""
    rows = value_at(document.data, [key])
    if not isinstance(rows, list):
        raise InputError(f"needs a list under the key {key}", document.where())
    named: dict[str, Row] = {}
    for index in range(len(rows)):
        row = converted(document, kind, (key, index))
        if row.name in named:
            raise problem_at(document, (key, index, "name"), f"{shown(row.name)} is the name of an earlier row")
        named[row.name] = row
    return named
