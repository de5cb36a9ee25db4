"""Keys of one family in a file of another: refused by name, or remarked on, and never counted or lost silently."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hf_decoders import NEEDED, Settings

from powerplan import huggingface
from powerplan.documents import parse_json
from powerplan.errors import InputError
from powerplan.huggingface import FAMILIES, read_config
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.defaults import tables
from powerplan.huggingface.inert import INERT
from powerplan.spec import ModelSpec

SHARE = 1 if os.environ.get("POWERPLAN_FUZZ") else 8
"""One in so many keys is tried alone, as a number, true, a list and an object are; all are tried as words."""

FLA = json.loads((Path(__file__).parent.parent / "data" / "fla_parameter_counts.json").read_text(encoding="utf-8"))
OF_FLA: dict[str, Settings] = {row["config"]["model_type"]: row["config"] for row in reversed(FLA["models"])}

PLAIN: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
"""What a file of a family states whose code is on the hub alone, beside what is in STATED."""

EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

STATED: dict[str, Settings] = {
    **dict.fromkeys(("bailing_moe", "bailing_moe_v2", "deepseek"), EXPERTS),
    "deci": {"num_key_value_heads_per_layer": [2, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "kimi_linear": {"first_k_dense_replace": 1},
    "minimax_m1": {"num_hidden_layers": 2, "attn_type_list": [0, 1]},
    "minimax_text_01": {"num_hidden_layers": 2, "attn_type_list": [0, 1]},
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}}] * 2,
        "intermediate_size": None,
    },
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
}
"""What a file of a family must state, as its config class has no default that can be read."""

EVERY = sorted({key for known in tables().families.values() for key in (*known.defaults, *known.aliases)} - INERT)


def default_file(name: str) -> Settings:
    """Return a file of the family with what its config class has as defaults."""
    known = tables().families.get(FAMILIES[name].like or name)
    own = OF_FLA.get(name, PLAIN) if known is None else known.defaults
    return {**own, **FAMILIES[name].defaults} | NEEDED.get(name, {}) | STATED.get(name, {}) | {"model_type": name}


def read(data: Settings) -> tuple[ModelSpec, tuple[str, ...]]:
    return read_config(parse_json(json.dumps(data, indent=2), "config.json"), "model")


def looked_up(config: Config) -> Iterator[str]:
    yield from config.data.looked_up
    for part in config.parts:
        yield from looked_up(part)


def foreign_keys(name: str, file: Settings, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelSpec, list[str]]:
    """Return the spec of a file, and the keys of other families that its own neither has nor reads."""
    seen: list[Config] = []
    audit = huggingface.audit

    def spy(config: Config, family: Family, *, refuse: bool) -> None:
        seen.append(config)
        audit(config, family, refuse=refuse)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "audit", spy)
        spec, _ = read(file)
    (config,) = seen
    known = {*file, *FAMILIES[name].inert, *config.aliases, *config.aliases.values(), *looked_up(config)}
    return spec, [key for key in EVERY if key not in known]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_keys_of_other_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = default_file(name)
    spec, foreign = foreign_keys(name, file, monkeypatch)
    assert len(foreign) > 50
    for value in ("word", 0.5, False):
        counted, notes = read(file | dict.fromkeys(foreign, value))
        (note,) = (note for note in notes if note.startswith(f"not known for {name}, and not counted: "))
        assert note.partition(": ")[2].split(", ") == sorted(foreign)
        assert counted == spec
    for nothing in (None, 0, "", []):
        assert read(file | dict.fromkeys(foreign, nothing))[0] == spec

    values: list[Any] = [7, True, [1, 2], {"size": 7}]
    for key in foreign:
        code = crc32(f"{name} {key}".encode())
        if code % SHARE == 0:
            value = values[code // SHARE % len(values)]
            with pytest.raises(InputError, match=f"^config.json:[0-9:]+ {key} .* is not known for {name}, and"):
                read(file | {key: value})
