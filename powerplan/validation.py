"""Validates specs. The error names the place, the value that stands there, what is allowed, and near spellings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from powerplan.documents import Document, Step
from powerplan.errors import InputError, allowed_values, shown, unknown_word
from powerplan.extras import Extra
from powerplan.ffn import FFNS
from powerplan.mixers import MIXERS, SIZED, allowed_kinds
from powerplan.part import Part
from powerplan.quantization import Quantization, Rule
from powerplan.rope import SCALINGS, Rope
from powerplan.shorthand import with_defaults
from powerplan.spec import LENGTHS, Layer, LayerGroup, ModelSpec, Norm
from powerplan.units import parse_context

UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
MISSING_FIELD = re.compile(r"Object missing required field `(.*)`\Z")
OWN_CHECK = re.compile(r"(\w+): (.*)\Z", re.DOTALL)
"""What msgspec says: of a key that is none, of one that is not there; and what `Part.check` says, "field: problem"."""


def validate(document: Document) -> ModelSpec:
    """Return the spec that `document` holds. Raises InputError with file:line:column of the first mistake."""
    if not isinstance(document.data, dict):
        problem = "a spec is a mapping with name, hidden_size, layers ..., and this is"
        raise InputError(f"{problem} {_TYPES.get(type(document.data).__name__, 'a value')}", document.where())
    data = with_defaults(document.data)
    if "layers" in data:  # Checked last: a mistake in another key may be the reason for one in a layer.
        data = {key: value for key, value in data.items() if key != "layers"} | {"layers": data["layers"]}
    try:
        return msgspec.convert(data, ModelSpec)
    except msgspec.ValidationError as error:
        raise _located(str(error), document) from None


def _located(message: str, document: Document) -> InputError:
    """Return the error for a message of msgspec's, at its place in the document."""
    text, path = split_message(message, document.data)
    if field := UNKNOWN_FIELD.match(text):
        keys = allowed_keys(document.data, path)
        path.append(field[1])
        problem = f"unknown key{allowed_values(field[1], keys)}"
        return InputError(f"{dotted(path)}: {problem}", document.where(path, at_key=True))
    if field := MISSING_FIELD.match(text):
        return _missing(field[1], document, path)
    value = value_at(document.data, path)
    if (field := OWN_CHECK.match(text)) and field[1] in _field_names(document.data, path):
        text = field[2]
        if isinstance(value, dict) and field[1] in value:
            path.append(field[1])
            value = value[field[1]]
    problem = plain_problem(text, value, allowed_words(document.data, path))
    if path and isinstance(value, str):
        problem = _word_problem(value, path, document.data) or problem
    return InputError(f"{dotted(path)}: {problem}" if path else problem, document.where(path))


def _word_problem(word: str, path: Sequence[Step], data: Any) -> str | None:
    """Return a better message than msgspec's for a word in the place of a size, a mapping or a kind, or None."""
    step = path[-1]
    if step in LENGTHS:
        try:
            parse_context(word)
        except InputError as error:
            return error.problem
    if step in ("mixer", "ffn", "norm", "scaling") and word in allowed_words(data, [*path, "kind"]):
        return f"{shown(word)} is not a mapping; write {step}: {{kind: {word}, ...}}"
    if step == "kind" and path[-2:-1] == ["mixer"] and word in FFNS:
        return f"{shown(word)} is an ffn, not a mixer; allowed are {', '.join(allowed_words(data, path))}"
    if step == "kind" and path[-2:-1] == ["ffn"] and word in MIXERS:
        return f"{shown(word)} is a mixer, not an ffn; allowed are {', '.join(allowed_words(data, path))}"
    if step == "kind" and path[-2:-1] == ["mixer"]:
        return f"{shown(word)} is not known{allowed_kinds(word, allowed_words(data, path))}"
    return None


def plain_problem(message: str, value: Any, allowed: Sequence[str] = ()) -> str:
    """Return in plain words what msgspec's `message` says of a value; `allowed`: the words that it may be, if any."""
    if message.startswith(("Invalid enum value", "Invalid value")) or (allowed and message.startswith("Expected")):
        return unknown_word(value, allowed)
    if match := re.match(r"Expected `(?:int|float)` (>=|<=|>|<) (\S+)$", message):
        word = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}[match[1]]
        bound = f"{int(float(match[2])):,}" if re.fullmatch(r"\d+(\.0)?", match[2]) else match[2]
        return f"{shown(value)} is out of range; allowed is {word} {bound}"
    if match := re.match(r"Expected `(array|str)` of length >= 1$", message):
        return "is empty; at least one is needed" if match[1] == "array" else "is empty"
    if match := re.match(r"Expected `str` of length <= (\d+)$", message):
        return f"is longer than {match[1]} characters"
    if match := re.match(r"Expected `([^`]*)`, got `", message):
        types = [name.strip() for name in match[1].split("|") if name.strip() != "null"]
        return f"{shown(value)} is not {' or '.join(_TYPES.get(name, name) for name in types)}{_remedy(value, types)}"
    return message


def _remedy(value: Any, types: Sequence[str]) -> str:
    """Return how to write a value so that it has one of `types`, or "" if that is not clear."""
    if "int" in types and isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value):
        return f"; write {value} without quotes"
    if "int" in types and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if "bool" in types and value in ("true", "false"):
        return f"; write {value} without quotes"
    if "str" in types and isinstance(value, (bool, int, float)):
        return "; put it in quotes"
    return ""


_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "array": "a list",
    "list": "a list",
    "object": "a mapping",
    "dict": "a mapping",
    "NoneType": "empty",
}
"""Types of msgspec, JSON and Python, in the words of an error message."""


def split_message(message: str, data: Any) -> tuple[str, list[Step]]:
    """Return msgspec's message without its place, and the place as a path in the data."""
    at_top = UNKNOWN_FIELD.match(message)
    text, separator, where = message.rpartition(" - at `$")
    if not separator or (at_top and at_top[1] in data):  # An unknown key may contain " - at `$" itself.
        return message, []
    steps = re.findall(r"\.(\w+)|\[(\d+)\]", where.rstrip("`"))
    return text, [int(index) if index else name for name, index in steps]


def _missing(name: str, document: Document, path: list[Step]) -> InputError:
    """Return the error for a required field that the mapping at `path` does not have."""
    where = document.where(path)
    if name == "kind":
        kinds = allowed_words(document.data, [*path, name])
        return InputError(f"{dotted(path)}: needs a kind; allowed are {', '.join(kinds)}", where)
    given = value_at(document.data, path)
    problem = "is missing"
    if name == "head_dim" and isinstance(given, dict) and given.get("kind") in SIZED and "heads" in given:
        if "hidden_size" not in document.data:
            return InputError("hidden_size: is missing", document.where())
        hidden, heads = shown(document.data["hidden_size"]), shown(given["heads"])
        problem += f", and hidden_size {hidden} is not a multiple of heads {heads}"
    return InputError(f"{dotted([*path, name])}: {problem}", where)


def dotted(path: Sequence[Step]) -> str:
    """Return a path as messages write it: "layers[0].mixer.heads"."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            word = step if re.fullmatch(r"[\w.-]{1,60}", step) else shown(step)
            text += f".{word}" if text else word
    return text


def value_at(data: Any, path: Sequence[Step]) -> Any:
    """Return the value at a path of nested data; None where there is none."""
    for step in path:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data


_NESTED: dict[str, type[Part]] = {
    "norm": Norm,
    "layers": LayerGroup,
    "pattern": Layer,
    "extras": Extra,
    "quantization": Quantization,
    "rules": Rule,
    "rope": Rope,
}

_BY_KIND: dict[str, Mapping[str, type[Part]]] = {"mixer": MIXERS, "ffn": FFNS, "scaling": SCALINGS}
"""Fields whose class a `kind` names."""


def _part_at(data: Any, path: Sequence[Step]) -> type[Part] | None:
    """Return the class of the part of a spec at `path`, or None if its kind is not known."""
    part: type[Part] | None = ModelSpec
    for index, step in enumerate(path):
        if isinstance(step, str):
            kind = value_at(data, [*path[: index + 1], "kind"])
            part = _BY_KIND[step].get(kind) if step in _BY_KIND and isinstance(kind, str) else _NESTED.get(step)
    return part


def _field_names(data: Any, path: Sequence[Step]) -> list[str]:
    part = _part_at(data, path)
    return list(part.__struct_fields__) if part else []


def allowed_keys(data: Any, path: Sequence[Step]) -> list[str]:
    """Return the keys that the mapping at `path` of a spec may have, sorted."""
    return sorted([*_field_names(data, path), *(["kind"] if path and path[-1] in _BY_KIND else [])])


def allowed_words(data: Any, path: Sequence[Step]) -> list[str]:
    """Return the words that the field at `path` of a spec may be; empty if it is not a choice of words."""
    if not path or not isinstance(path[-1], str):
        return []
    if path[-1] == "kind" and len(path) > 1 and path[-2] in _BY_KIND:
        return sorted(_BY_KIND[str(path[-2])])
    part = _part_at(data, path[:-1])
    return words_of(part, path[-1]) if part else []


def words_of(part: type[Part], field: str) -> list[str]:
    """Return the words that a field may be, with true and false if it may also be a flag; empty if it has no words."""
    if field not in part.__struct_fields__:
        return []
    kind = get_type_hints(part)[field]
    options = [kind, *get_args(kind)]
    words = [str(word) for option in options if get_origin(option) is Literal for word in get_args(option)]
    return ["true", "false", *words] if words and bool in options else words
