"""The families as a list: which model_type is read, which wraps another, which is refused, and the keys that matter."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Literal, NamedTuple

from powerplan.documents import parse_json
from powerplan.errors import InputError
from powerplan.huggingface.config import Config
from powerplan.huggingface.defaults import class_defaults
from powerplan.huggingface.families import FAMILIES, REFUSED, wrapped_families
from powerplan.huggingface.inert import INERT


class Listed(NamedTuple):
    """A model_type.

    detail: of a wrapper the model_type of its text decoder where the file names none, or "any" where it must; and why
    another is refused.
    """

    model_type: str
    status: Literal["read", "wrapper", "refused"]
    detail: str


def listed_families() -> list[Listed]:
    """Return every model_type that is known, sorted."""
    rows = [Listed(name, "read", "") for name in FAMILIES]
    rows += [Listed(name, "wrapper", text or "any") for name, text in wrapped_families().items()]
    rows += [Listed(name, "refused", reason) for name, reason in REFUSED.items()]
    return sorted(rows)


def keys_that_matter(model_type: str) -> list[str]:
    """Return the keys that the reader of a family looks up in a config of its class's defaults.

    Empty where transformers has no class of that model_type. Keys that are looked up in other settings alone, as those
    of experts that are off by default, are left out.
    """
    family = FAMILIES[model_type]
    known = class_defaults(family.like or model_type, nested=True)
    data = {**known.defaults, **family.defaults}
    if not data:
        return []
    config = Config(parse_json(json.dumps(data | {"model_type": model_type}), model_type))
    config.defaults, config.aliases = data, {**known.aliases, **family.aliases}
    with suppress(InputError):  # Some classes have no default for what every file states.
        family.read(config, model_type)
    return sorted((config.data.looked_up & data.keys()) - INERT)
