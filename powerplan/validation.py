"""Turns what is wrong with a spec into one message: where, what stands there, what is allowed, what is near."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from powerplan.documents import Document, Step
from powerplan.errors import InputError, did_you_mean, shown
from powerplan.ffn import FFNS
from powerplan.mixers import MIXERS
from powerplan.mixers.base import Part
from powerplan.spec import HEADED, Layer, LayerGroup, ModelSpec, Norm, with_defaults


def validate(document: Document) -> ModelSpec:
    """Return the spec that `document` holds; raises InputError with file:line:column of the first mistake."""
    if not isinstance(document.data, dict):
        found = _TYPES.get(type(document.data).__name__, "a value")
        raise InputError(
            f"a spec is a mapping with name, hidden_size, layers ..., and this is {found}", document.where()
        )
    try:
        return msgspec.convert(with_defaults(document.data), ModelSpec)
    except msgspec.ValidationError as error:
        raise _located(str(error), document) from None


def _located(message: str, document: Document) -> InputError:
    text, path = _split(message)
    if field := re.match(r"Object contains unknown field `(.*)`$", text, re.DOTALL):
        keys = allowed_keys(document.data, path)
        path.append(field[1])
        problem = f"unknown key{did_you_mean(field[1], keys)}; allowed are {', '.join(keys)}"
        return InputError(f"{_dotted(path)}: {problem}", document.where(path, at_key=True))
    if field := re.match(r"Object missing required field `(.*)`$", text):
        problem = _missing(field[1], document, path)
        label = _dotted([*path, field[1]]) if field[1] != "kind" else _dotted(path)
        return InputError(f"{label}: {problem}", document.where(path))
    if (field := re.match(r"(\w+): (.*)$", text, re.DOTALL)) and field[1] in _field_names(document.data, path):
        path.append(field[1])
        text = field[2]
    problem = plain_problem(text, _value(document.data, path), allowed_words(document.data, path))
    return InputError(f"{_dotted(path)}: {problem}" if path else problem, document.where(path))


def plain_problem(text: str, value: Any, words: Sequence[str] = ()) -> str:
    """Return a sentence for a message of msgspec's about `value`; `words` are the allowed ones where it is a choice."""
    if text.startswith(("Invalid enum value", "Invalid value")) or (words and text.startswith("Expected")):
        near = did_you_mean(value, words) if isinstance(value, str) else ""
        return f"{shown(value)} is not known{near}; allowed are {', '.join(words)}"
    if match := re.match(r"Expected `(?:int|float)` (>=|<=|>|<) (\S+)$", text):
        word = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}[match[1]]
        return f"{shown(value)} is out of range; allowed is {word} {_grouped(match[2])}"
    if match := re.match(r"Expected `(array|str)` of length >= 1$", text):
        return "is empty; at least one is needed" if match[1] == "array" else "is empty"
    if match := re.match(r"Expected `str` of length <= (\d+)$", text):
        return f"is longer than {match[1]} characters"
    if match := re.match(r"Expected `([^`]*)`, got `", text):
        wanted = [_TYPES.get(name.strip(), name.strip()) for name in match[1].split("|") if name.strip() != "null"]
        return f"{shown(value)} is not {' or '.join(wanted)}"
    return text


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


def _grouped(number: str) -> str:
    return f"{int(number):,}" if number.isdigit() else number


def _split(message: str) -> tuple[str, list[Step]]:
    text, found, where = message.rpartition(" - at `$")
    if not found:
        return message, []
    steps = re.findall(r"\.(\w+)|\[(\d+)\]", where.rstrip("`"))
    return text, [int(index) if index else name for name, index in steps]


def _missing(name: str, document: Document, path: Sequence[Step]) -> str:
    if name == "kind":
        return "needs a kind, such as kind: attention (mixer) or kind: mlp (ffn)"
    given = _value(document.data, path)
    if name == "head_dim" and isinstance(given, dict) and given.get("kind") in HEADED and "heads" in given:
        hidden = document.data.get("hidden_size")
        return f"is missing, and hidden_size {shown(hidden)} is not a multiple of heads {shown(given['heads'])}"
    return "is missing"


def _dotted(path: Sequence[Step]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _value(data: Any, path: Sequence[Step]) -> Any:
    for step in path:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data


_NESTED: dict[str, type[Part]] = {"norm": Norm, "layers": LayerGroup, "pattern": Layer}


def _part_at(data: Any, path: Sequence[Step]) -> type[Part] | None:
    """Return the class of the part at `path`, or None where its kind is not known."""
    part: type[Part] | None = ModelSpec
    for index, step in enumerate(path):
        if isinstance(step, str):
            kind = _value(data, [*path[: index + 1], "kind"])
            classes: dict[str, Any] = MIXERS if step == "mixer" else FFNS
            part = classes.get(kind) if step in ("mixer", "ffn") and isinstance(kind, str) else _NESTED.get(step)
    return part


def _field_names(data: Any, path: Sequence[Step]) -> list[str]:
    part = _part_at(data, path)
    return list(part.__struct_fields__) if part else []


def allowed_keys(data: Any, path: Sequence[Step]) -> list[str]:
    """Return the keys that a mapping at `path` of a spec may have, sorted."""
    is_block = bool(path) and path[-1] in ("mixer", "ffn")
    return sorted([*_field_names(data, path), *(["kind"] if is_block else [])])


def allowed_words(data: Any, path: Sequence[Step]) -> list[str]:
    """Return the words that the field at `path` may be, empty where it is not a choice of words."""
    if not path or not isinstance(path[-1], str):
        return []
    if path[-1] == "kind" and len(path) > 1 and path[-2] in ("mixer", "ffn"):
        return sorted(MIXERS if path[-2] == "mixer" else FFNS)
    part = _part_at(data, path[:-1])
    return words_of(part, path[-1]) if part else []


def words_of(part: type[Part], field: str) -> list[str]:
    """Return the words that a field of a part may be: true and false where it may be a flag too."""
    if field not in part.__struct_fields__:
        return []
    kind = get_type_hints(part)[field]
    options = [kind, *get_args(kind)]
    words = [str(word) for option in options if get_origin(option) is Literal for word in get_args(option)]
    return ["true", "false", *words] if words and bool in options else words
