"""The JSON schema of a spec, for editors and other tools."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from powerplan.ffn import Stem
from powerplan.mixers import MIXERS, SIZED
from powerplan.part import Part
from powerplan.spec import LENGTHS, Layer, LayerGroup, ModelSpec

_SIZE = {"type": "string", "pattern": r"^[0-9][0-9_,]*(\.[0-9]+)?([eE]\+?[0-9]{1,2})?[kKmMgG]?$"}
_ENTRY = re.compile(r"([a-z]\w*): (.+)")


def spec_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a powerplan YAML and its shorthand: head_dim left out, sizes such as "4k".

    Every field has the description that the docstring of its class gives (python -OO leaves docstrings out).
    """
    schema = msgspec.json.schema(ModelSpec)
    parts = {part.__name__: part for part in _subclasses(Part)}
    for name, definition in schema["$defs"].items():
        _describe(definition, parts[name])
        _add_sizes(definition["properties"])
    for kind, mixer in MIXERS.items():
        definition = schema["$defs"][mixer.__name__]
        properties = definition["properties"]
        if kind in SIZED:
            definition["required"].remove("head_dim")
            _add(properties["head_dim"], "hidden_size / heads where left out")
        for name, same in mixer.same_as.items():
            del properties[name]["default"]
            _add(properties[name], f"the same as {same} where left out")
    definition = schema["$defs"][Stem.__name__]
    definition["required"].remove("vocab_size")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "powerplan.spec/1", **schema}


def field_descriptions(part: type[Part]) -> dict[str, str]:
    """Return what docstrings say of the fields of a part, that of the class itself before those of its bases.

    A line of a docstring that begins with the name of a field and a colon describes it, up to the next such line or the
    end of the paragraph. A group of layers has the fields of a layer.
    """
    bases: list[Any] = [base for base in part.__mro__ if issubclass(base, Part)]
    found: dict[str, str] = {}
    for base in [*bases, Layer] if part is LayerGroup else bases:
        found = _own_descriptions(base) | found
    return {field: found[field] for field in part.__struct_fields__ if field in found}


def _own_descriptions(part: type[Part]) -> dict[str, str]:
    found: dict[str, str] = {}
    for paragraph in inspect.cleandoc(part.__doc__ or "").split("\n\n"):
        field = None
        for line in paragraph.splitlines():
            entry = _ENTRY.match(line)
            if entry and entry[1] in part.__struct_fields__:
                field, found[entry[1]] = entry[1], entry[2]
            elif field is not None:
                found[field] += f" {line}"
    return {field: text.rstrip(".") for field, text in found.items()}


def _describe(definition: dict[str, Any], part: type[Part]) -> None:
    """Add the descriptions of fields, and of `kind` that of the class."""
    properties = definition["properties"]
    summary = inspect.cleandoc(part.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    texts = {"kind": summary.rstrip(".")} if part.__struct_config__.tag is not None else {}
    for field, text in (texts | field_descriptions(part)).items():
        properties[field]["description"] = text


def _add_sizes(properties: dict[str, Any]) -> None:
    """Let the properties that are lengths be sizes as well."""
    for name in LENGTHS:
        if name in properties:
            number = properties[name]
            others = {key: number.pop(key) for key in ("default", "description") if key in number}
            properties[name] = {"anyOf": [*number.get("anyOf", [number]), _SIZE], **others}


def _add(field: dict[str, Any], text: str) -> None:
    field["description"] = "; ".join(filter(None, (field.get("description"), text)))


def _subclasses(part: type[Part]) -> Iterator[type[Part]]:
    for own in part.__subclasses__():
        yield own
        yield from _subclasses(own)
