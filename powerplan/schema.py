"""The JSON schema of a spec, for editors and other tools."""

from __future__ import annotations

from typing import Any

import msgspec

from powerplan.mixers import MIXERS, SIZED
from powerplan.spec import LENGTHS, ModelSpec

_SIZE = {"type": "string", "pattern": r"^[0-9][0-9_,]*(\.[0-9]+)?([eE]\+?[0-9]{1,2})?[kKmMgG]?$"}


def spec_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a powerplan YAML and its shorthand: head_dim left out, sizes such as "4k"."""
    schema = msgspec.json.schema(ModelSpec)
    for definition in schema["$defs"].values():
        _add_sizes(definition["properties"])
    for kind, mixer in MIXERS.items():
        definition = schema["$defs"][mixer.__name__]
        properties = definition["properties"]
        if kind in SIZED:
            definition["required"].remove("head_dim")
        for name, same in mixer.same_as.items():
            del properties[name]["default"]
            properties[name]["description"] = f"the same as {same} where left out"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "powerplan.spec/1", **schema}


def _add_sizes(properties: dict[str, Any]) -> None:
    """Let the properties that are lengths be sizes as well."""
    for name in LENGTHS:
        if name in properties:
            number = properties[name]
            default = {key: number.pop(key) for key in ("default",) if key in number}
            properties[name] = {"anyOf": [*number.get("anyOf", [number]), _SIZE], **default}
