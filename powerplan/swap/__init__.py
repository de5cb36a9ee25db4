"""The same model with another sequence mixer: `Swap` says which, `with_mixer` reads it from a `--mixer` text."""

from __future__ import annotations

from powerplan.spec import ModelSpec
from powerplan.swap.rebuild import first_relative, rebuilt, renamed, swapped
from powerplan.swap.value import Swap, parse_swap, swap_text

__all__ = ["Swap", "first_relative", "parse_swap", "rebuilt", "renamed", "swap_text", "swapped", "with_mixer"]


def with_mixer(spec: ModelSpec, text: str) -> tuple[ModelSpec, list[str]]:
    """Return a model with the mixer that a text describes in every layer.

    Args:
        spec: the model.
        text: a kind with settings, as `--mixer` takes it: attention, window:4096, power:p=2,gated=true, linear, kda.

    Returns:
        The changed model, named after the text, and remarks on what was assumed.

    Raises:
        InputError: for an unknown kind or setting.
    """
    changed, remarks = swapped(spec, parse_swap(text))
    return renamed(changed, spec.name, text), remarks
