"""Every model_type that is read, its reader and its defaults; and those that are refused, with the reason."""

from __future__ import annotations

from powerplan.huggingface import dense, experts, fla, hybrids, mamba
from powerplan.huggingface.config import Family
from powerplan.huggingface.defaults import tables

FAMILIES: dict[str, Family] = {
    **dense.FAMILIES,
    **experts.FAMILIES,
    **hybrids.FAMILIES,
    **mamba.FAMILIES,
    **fla.FAMILIES,
}
"""The reader of each model_type. Wrappers (mistral3 ...) are read through their text_config."""

REFUSED: dict[str, str] = {}
"""Language models of transformers that are not read, and why."""


def wrapped_families() -> dict[str, str]:
    """Return the wrappers whose text decoder is read, and the model_type of a text_config that names none."""
    wrappers = {name: wrapper.text for name, wrapper in tables().wrappers.items() if name not in FAMILIES}
    return {name: text for name, text in wrappers.items() if text in FAMILIES}


def supported_families() -> list[str]:
    """Return the model_type values that are read, wrappers included."""
    return sorted({*FAMILIES, *wrapped_families()})
