"""Files that differ in one key: the count is that of the model which transformers builds of them, or they are refused.

This holds INERT as well: a key on that list must change no count of any family.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import pytest
from hf_decoders import Settings, odd_settings, stored_elements, written
from hf_meta import on_meta

from powerplan.accounting import Accounting
from powerplan.documents import parse_json
from powerplan.errors import InputError
from powerplan.huggingface import FAMILIES, read_config
from powerplan.huggingface.inert import INERT

pytestmark = pytest.mark.transformers

auto = pytest.importorskip("transformers.models.auto.modeling_auto")
DECODERS = sorted(name for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in FAMILIES)

FUZZ = bool(os.environ.get("POWERPLAN_FUZZ"))
"""Every key with every value. Without it, each key that may count has one value, and one in ten of the others too."""

NAMES = frozenset({"architectures", "model_type", "dtype", "torch_dtype", "transformers_version"})
"""Keys that say which code reads the file."""

ELSEWHERE: dict[tuple[str, str], str] = {}
"""Keys of families whose count is not that of transformers' model, and why."""


def mutated(value: Any) -> list[Any]:
    """Return other values for a key: of its type, then null, or a number where it is null."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value or 1, value + 1, None]
    if isinstance(value, float):
        return [1.5 * value or 0.5]
    if isinstance(value, list):
        return [value[::-1], value[:-1], None] if value else [[1]]
    if isinstance(value, dict):
        return [{}, None]
    return [8, True, [1]] if value is None else [None, "gelu"]


def counted(data: Settings) -> int | None:
    """Return the parameters that powerplan counts in a file, None where it refuses the file."""
    try:
        spec, _ = read_config(parse_json(json.dumps(data), "config.json"), "model")
    except InputError:
        return None
    return Accounting(spec).total_parameters.with_embeddings


def built(transformers: Any, data: Settings, known: dict[str, int]) -> int | None:
    """Return the elements of the model that transformers builds of a file, None where it builds none.

    known: those of models that have been built, by the whole text of their configs.
    """
    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[data["model_type"]]
    try:
        config_class = transformers.CONFIG_MAPPING[data["model_type"]]
        config = config_class.from_dict(config_class._decode_special_floats(dict(data)))
        text = config.to_json_string(use_diff=False)
        if text in known:
            return known[text]
        with on_meta():
            model = getattr(transformers, names if isinstance(names, str) else names[0])(config)
    except Exception:  # whatever its validation and its layers raise
        return None
    known[text] = stored_elements(model)
    return known[text]


def changes(name: str, data: Settings) -> Iterator[tuple[str, list[Any]]]:
    """Yield the keys to change, each with its values."""
    for key, value in data.items():
        inert = key in INERT or key in FAMILIES[name].inert
        if key not in NAMES and (FUZZ or not inert or crc32(f"{name} {key}".encode()) % 10 == 0):
            yield key, mutated(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DECODERS)
def test_one_key(transformers: Any, torch: Any, name: str) -> None:
    """In the whole file, and in one without what is the default: what is left out may follow from the key."""
    config_class = transformers.CONFIG_MAPPING[name]
    config = config_class(**odd_settings(config_class, name, flip=False))
    whole = written(config, "whole")
    wrong, known = [], dict[str, int]()
    for form in ("whole", "diff"):
        base, compared = written(config, form), 0
        assert counted(base) == built(transformers, base, known)
        for key, values in changes(name, whole):
            for value in values:
                ours = counted(base | {key: value})
                theirs = None if ours is None else built(transformers, base | {key: value}, known)
                if theirs is not None:
                    compared += 1
                    if ours != theirs and (name, key) not in ELSEWHERE:
                        wrong.append(f"{form}, {key} {value}: {ours} for {theirs}")
                    if not FUZZ:
                        break
        assert compared > 3
    assert not wrong, "\n".join(wrong)
