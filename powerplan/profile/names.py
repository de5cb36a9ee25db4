"""Names of the mixers in a profile: all different, since times are kept and looked up by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from powerplan.mixers import GroupedHeads

DIFFERENCES: tuple[Callable[[Any], str], ...] = (
    lambda mixer: f"{mixer.heads}x{mixer.head_dim}",
    lambda mixer: f"kv {mixer.kv_heads}",
    lambda mixer: f"v {mixer.v_head_dim}",
    lambda mixer: "" if mixer.has_normaliser else "unnormalised",
    lambda mixer: "gated" if mixer.gated else "",
    lambda mixer: f"chunk {mixer.chunk_size}" if mixer.chunk_size else "",
    lambda mixer: f"tile {mixer.tile}",
    lambda mixer: "output gate" if mixer.output_gate else "",
    lambda mixer: f"{mixer.qk_norm} qk-norm" if mixer.qk_norm != "none" else "",
    lambda mixer: {True: "bias", False: ""}.get(mixer.bias, f"{mixer.bias} bias"),
)
"""Suffixes that tell mixers of equal names apart. They are tried in this order."""


def distinct_names(mixers: list[GroupedHeads]) -> dict[GroupedHeads, str]:
    """Return a name for each mixer: "softmax", "window 1,040", "power p=2", with a suffix where two would be equal."""
    names = {mixer: _short_name(mixer) for mixer in mixers}
    for difference in DIFFERENCES:
        for name in set(names.values()):
            namesakes = [mixer for mixer in mixers if names[mixer] == name]
            try:
                suffixes = {mixer: difference(mixer) for mixer in namesakes}
            except AttributeError:  # Softmax attention has no chunks, linear attention no tiles.
                continue
            if len(set(suffixes.values())) > 1:
                names |= {mixer: f"{name} {suffix}".rstrip() for mixer, suffix in suffixes.items()}
    for name in set(names.values()):
        for number, mixer in enumerate([mixer for mixer in mixers if names[mixer] == name][1:], 2):
            names[mixer] = f"{name} #{number}"
    return names


def _short_name(mixer: GroupedHeads) -> str:
    return "softmax" if mixer.family == "attention" else mixer.describe().removeprefix("attention, ")
