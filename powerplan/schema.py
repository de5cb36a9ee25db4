"""The JSON schema of a spec."""

from __future__ import annotations

from typing import Any

import msgspec

from powerplan.spec import LENGTHS, ModelSpec


def spec_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a powerplan YAML.

    head_dim is not required where it may be left out, and lengths in tokens may be sizes such as "4k".
    """
    schema = msgspec.json.schema(ModelSpec)
    for definition in schema["$defs"].values():
        properties = definition["properties"]
        if "kv_heads" in properties:
            definition["required"].remove("head_dim")
            for name, same in (("kv_heads", "heads"), ("v_head_dim", "head_dim")):
                del properties[name]["default"]
                properties[name]["description"] = f"the same as {same} where left out"
        for name in LENGTHS:
            if name in properties:
                properties[name]["anyOf"].append(
                    {"type": "string", "pattern": r"^[0-9][0-9_,]*(\.[0-9]+)?([eE]\+?[0-9]{1,2})?[kKmMgG]?$"}
                )
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "powerplan.spec/1", **schema}
