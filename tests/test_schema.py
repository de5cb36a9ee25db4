"""Every field of the JSON schema has a description, and sizes have their unit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from powerplan.cli import main
from powerplan.schema import field_descriptions, spec_schema
from powerplan.spec import LENGTHS, LayerGroup, ModelSpec

DEFINITIONS: dict[str, Any] = spec_schema()["$defs"]
FIELDS = [(name, field, entry) for name, part in DEFINITIONS.items() for field, entry in part["properties"].items()]
UNITS = dict.fromkeys((*LENGTHS, "position_embeddings", "conv_size", "vocab_size", "compress_rate"), "tokens")
UNITS |= dict.fromkeys(("head_dim", "v_head_dim", "hidden_size", "intermediate_size", "kv_lora_rank"), "features")
UNITS |= dict.fromkeys(("bits", "scale_bits", "zero_bits", "column_bits", "matrix_bits"), "bits")


@pytest.mark.parametrize(("name", "field", "entry"), FIELDS, ids=[f"{name}.{field}" for name, field, _ in FIELDS])
def test_every_field_is_described(name: str, field: str, entry: dict[str, Any]) -> None:
    text = entry.get("description", "")
    assert len(text) > 8, f"the docstring of {name} (or of a base) has no line that begins with '{field}: '"
    assert "\n" not in text
    if unit := UNITS.get(field):
        assert unit in text or (field == "head_dim" and "channels" in text), f"{name}.{field}: {text}"


def test_no_description_swallows_another() -> None:
    """A line of a docstring that begins with a field's name begins a description of its own."""
    for name, field, entry in FIELDS:
        others = [other for other in DEFINITIONS[name]["properties"] if f" {other}: " in entry["description"]]
        assert not others, f"{name}.{field} holds that of {others}"


def test_descriptions_come_from_the_nearest_class() -> None:
    properties = DEFINITIONS["ChunkedAttention"]["properties"]
    assert properties["window"]["description"] == "tokens of a chunk"
    assert properties["sinks"] == DEFINITIONS["Attention"]["properties"]["sinks"]
    assert properties["kv_heads"]["description"].endswith("; the same as heads where left out")
    assert properties["head_dim"]["description"].endswith("; hidden_size / heads where left out")
    assert properties["kind"]["description"].startswith("Softmax attention within chunks")
    assert field_descriptions(LayerGroup)["tied"] == DEFINITIONS["Layer"]["properties"]["tied"]["description"]
    assert set(field_descriptions(ModelSpec)) == set(ModelSpec.__struct_fields__)


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$defs"] == json.loads(json.dumps(DEFINITIONS))
