"""Keys that no reader looked up: what may change the count refuses the file. And the family that has a file's keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from powerplan.errors import shown
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.defaults import tables
from powerplan.huggingface.families import FAMILIES
from powerplan.huggingface.inert import INERT


def audit(config: Config, family: Family, *, refuse: bool) -> None:
    """Go through the keys that `family`'s reader did not look up.

    A key passes that changes no count (INERT, or the family's inert keys), is null, 0 or empty, or has the family's
    default. False, a number with a point or a word get a remark. Anything else raises InputError if `refuse`, and gets
    a remark if not.
    """
    remarked = []
    for part, key, value in _not_looked_up(config):
        nothing = not value and value is not False
        if key in INERT or key in family.inert or nothing or value == config.defaults.get(key):
            continue
        other = _same_key(part, key)
        if other is not None:
            if part.data.peek(other) != value:
                raise part.error(
                    f"{key} is {shown(value)}, and {other}, its other name, {shown(part.data.peek(other))}", key
                )
            continue
        if refuse and value is not False and not isinstance(value, (float, str)):
            problem = f"{key} {shown(value)} is not known for {config.family}, and it may change the count"
            raise part.error(f"{problem}; take it out of the file if it does not", key)
        remarked.append(key)
    if remarked:
        config.note(f"not known for {config.family}, and not counted: {', '.join(sorted(set(remarked)))}")


def _same_key(config: Config, key: str) -> str | None:
    """Return the other name of a key that was looked up in place of it, where the file has both."""
    names = {*(stored for name, stored in config.aliases.items() if name == key)}
    names |= {name for name, stored in config.aliases.items() if stored == key}
    return next((name for name in sorted(names) if name in config.data.looked_up and config.has(name)), None)


def _not_looked_up(config: Config) -> Iterator[tuple[Config, str, Any]]:
    for key in config.data:
        if key not in config.data.looked_up:
            yield config, key, config.data.peek(key)
    for part in config.parts:
        yield from _not_looked_up(part)


NEAR = 0.5
"""The least share of keys, of those that a file or a family has, that both must have to be called alike."""


def nearest_family(data: Mapping[str, Any]) -> str | None:
    """Return the family that has the most keys in common with a config, or None where none has NEAR of them."""
    keys = {key for key in data if key not in INERT}
    shares = {}
    for name in FAMILIES:
        if known := tables().families.get(name):
            own = {*known.defaults, *known.aliases} - INERT
            shares[name] = len(keys & own) / len(keys | own)
    best = max(shares, key=lambda name: (shares[name], name), default=None)
    return best if best is not None and shares[best] >= NEAR else None
