"""Sequence mixers, one class per kind. A new kind is one class here and one entry in MIXERS."""

from __future__ import annotations

from powerplan.mixers.attention import Attention
from powerplan.mixers.base import Convention, Mixer, StateSize, Term
from powerplan.mixers.heads import GroupedHeads
from powerplan.mixers.mla import MLA
from powerplan.mixers.power import FeatureAttention, Linear, Power

AnyMixer = Attention | MLA | Power | Linear

MIXERS: dict[str, type[Mixer]] = {"attention": Attention, "mla": MLA, "power": Power, "linear": Linear}
"""Every mixer class by its `kind`."""

HEADED = frozenset(kind for kind, mixer in MIXERS.items() if issubclass(mixer, GroupedHeads))
"""Kinds with query and key/value heads: head_dim may be left out, and they can take over each other's heads."""

__all__ = [
    "HEADED",
    "MIXERS",
    "MLA",
    "AnyMixer",
    "Attention",
    "Convention",
    "FeatureAttention",
    "GroupedHeads",
    "Linear",
    "Mixer",
    "Power",
    "StateSize",
    "Term",
]
