"""Keys of one family in a file of another: refused by name, or remarked on, and never counted or lost silently.

And two names of one key, which must agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import pytest
from hf_decoders import Settings
from hf_files import default_file, read

from powerplan import huggingface
from powerplan.errors import InputError
from powerplan.huggingface import FAMILIES
from powerplan.huggingface.audit import audit
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.defaults import tables
from powerplan.huggingface.inert import INERT
from powerplan.spec import ModelSpec

SHARE = 1 if os.environ.get("POWERPLAN_FUZZ") else 8
"""One in so many keys is tried alone, as a number, true, a list and an object are; all are tried as words."""


def defaults_of(key: str) -> list[Any]:
    """Return what the families that have a key have as its default."""
    return [known.defaults[key] for known in tables().families.values() if key in known.defaults]


EVERY = sorted({key for known in tables().families.values() for key in (*known.defaults, *known.aliases)} - INERT)

OFF = {
    key
    for key in EVERY
    if any(value is False for value in defaults_of(key)) and all(value in (False, None) for value in defaults_of(key))
}
"""Flags that no family has on by default: false says nothing."""


def looked_up(config: Config) -> Iterator[str]:
    yield from config.data.looked_up
    for part in config.parts:
        yield from looked_up(part)


def foreign_keys(name: str, file: Settings, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelSpec, list[str]]:
    """Return the spec of a file, and the keys of other families that its own neither has nor reads."""
    seen: list[Config] = []

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
    for value, remarked in (("word", foreign), (0.5, foreign), (False, sorted(set(foreign) - OFF))):
        counted, notes = read(file | dict.fromkeys(foreign, value))
        (note,) = (note for note in notes if note.startswith(f"not known for {name}, and not counted: "))
        assert note.partition(": ")[2].split(", ") == remarked
        assert counted == spec
    nothings: list[Any] = [None, 0, "", []]
    for nothing in nothings:
        assert read(file | dict.fromkeys(foreign, nothing))[0] == spec

    values: list[Any] = [7, True, [1, 2], {"size": 7}]
    for key in foreign:
        code = crc32(f"{name} {key}".encode())
        if code % SHARE == 0:
            value = values[code // SHARE % len(values)]
            with pytest.raises(InputError, match=f"^config.json:[0-9:]+ {key} .* is not known for {name}, and"):
                read(file | {key: value})


def other_names(name: str) -> dict[str, str]:
    """Return the aliases of a family, transformers' and its own."""
    family = FAMILIES[name]
    known = tables().families.get(family.like or name)
    return {**(known.aliases if known else {}), **family.aliases}


@pytest.mark.parametrize("name", [name for name in sorted(FAMILIES) if other_names(name)])
def test_two_names_of_a_key_must_agree(name: str) -> None:
    file = default_file(name)
    pairs = [(key, other) for key, other in other_names(name).items() if type(file.get(other)) is int]
    for key, other in pairs:
        value = file[other]
        assert read(file | {key: value}) == read(file)
        with pytest.raises(InputError, match=f"{key} is {value + 1}, and {other}, its other name, {value}$"):
            read(file | {key: value + 1})
