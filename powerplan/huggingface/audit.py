"""Keys that no reader looked up: what may change the count refuses the file. And the family that has a file's keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from powerplan.errors import shown
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.defaults import tables
from powerplan.huggingface.families import FAMILIES
from powerplan.huggingface.inert import INERT


def audit(config: Config, family: Family, *, refuse: bool) -> None:
    """Go through the keys that `family`'s reader did not look up.

    A key passes that changes no count (INERT, or the family's inert keys), is null, 0 or empty, has the family's
    default, or is false where that is the default of every family that has it. Another false, a number with a point or
    a word get a remark. Anything else raises InputError if `refuse`, and gets a remark if not.
    """
    remarked = []
    for part, key, value in _not_looked_up(config):
        nothing = not value and (value is not False or key in _off_by_default())
        if key in INERT or key in family.inert or nothing or value == config.defaults.get(key):
            continue
        if _looked_up_by_another_name(part, key):
            continue
        if refuse and value is not False and not isinstance(value, (float, str)):
            problem = f"{key} {shown(value)} is not known for {config.family}, and it may change the count"
            raise part.error(f"{problem}; take it out of the file if it does not", key)
        remarked.append(key)
    if remarked:
        config.note(f"not known for {config.family}, and not counted: {', '.join(sorted(set(remarked)))}")


@cache
def _off_by_default() -> frozenset[str]:
    """Return the flags that are false by default in every family of transformers that has them."""
    flags = [(key, value) for known in tables().families.values() for key, value in known.defaults.items()]
    on = {key for key, value in flags if value not in (False, None)}
    return frozenset(key for key, value in flags if value is False) - on


def _looked_up_by_another_name(config: Config, key: str) -> bool:
    """Whether the reader looked up another name of a key, one that the file has too."""
    names = {name for pair in config.aliases.items() if key in pair for name in pair} - {key}
    return any(name in config.data.looked_up and config.data.peek(name) is not None for name in names & {*config.data})


def _not_looked_up(config: Config) -> Iterator[tuple[Config, str, Any]]:
    for key in config.data:
        if key not in config.data.looked_up:
            yield config, key, config.data.peek(key)
    for part in config.parts:
        yield from _not_looked_up(part)


WELL_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt2", "gpt_neox")
"""Families that are named first where several have as many keys in common with a file."""

NEAR = 0.5
"""The least share of a file's keys that a family must have to be called alike."""


def nearest_family(data: Mapping[str, Any]) -> str | None:
    """Return the family that has the most of a config's keys, or None where none has NEAR of them.

    Of several, a well-known one comes first, and then the one with the fewest keys beside.
    """
    keys = {key for key in data if key not in INERT}
    ranks = {}
    for name in dict.fromkeys((*WELL_KNOWN, *FAMILIES)):
        if keys and (known := tables().families.get(name)):
            own = {*known.defaults, *known.aliases} - INERT
            fame = len(WELL_KNOWN) - WELL_KNOWN.index(name) if name in WELL_KNOWN else 0
            ranks[name] = (len(keys & own) / len(keys), fame, -len(own - keys))
    best = max(ranks, key=lambda name: ranks[name], default=None)
    return best if best is not None and ranks[best][0] >= NEAR else None
