"""The same model with another sequence mixer: `Swap` says which, `with_mixer` reads it from a `--mixer` text."""

from __future__ import annotations

from powerplan.dims import odd_degree
from powerplan.mixers import Power
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
    swap = parse_swap(text)
    changed, remarks = swapped(spec, swap)
    if swap.kind == "power" and "normalize" not in swap.fields:
        powers = [mixer for mixer in changed.mixers() if isinstance(mixer, Power)]
        if any(odd_degree(mixer.p) and mixer.normalize for mixer in powers):
            remarks.append(
                f"{swap.describe()} counts a normaliser, which kernels of odd degrees do not have; "
                f"{swap_text(swap)},normalize=false counts none, as recommend and budget do"
            )
    return renamed(changed, spec.name, text), remarks
