"""Sequence mixers as modules, one class per kind of powerplan.mixers. A new kind is one class and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from powerplan.errors import InputError
from powerplan.mixers import (
    GLA,
    KDA,
    MLA,
    Attention,
    DeltaNet,
    GatedDeltaNet,
    Lightning,
    Linear,
    Mixer,
    Power,
    RetNet,
)
from powerplan.models.mixers.attention import SoftmaxAttention
from powerplan.models.mixers.delta import DeltaNetMixer, GatedDeltaNetMixer, GatedLinearAttention, KimiDeltaAttention
from powerplan.models.mixers.mla import LatentAttention
from powerplan.models.mixers.power import PowerAttention
from powerplan.models.mixers.retention import LightningAttention, Retention

BUILT: Mapping[type[Mixer], tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    Attention: (SoftmaxAttention, ("rope",)),
    MLA: (LatentAttention, ("rope",)),
    Power: (PowerAttention, ("rope", "impl")),
    Linear: (PowerAttention, ("rope", "impl")),
    RetNet: (Retention, ("rope", "impl")),
    Lightning: (LightningAttention, ("impl",)),
    GLA: (GatedLinearAttention, ()),
    DeltaNet: (DeltaNetMixer, ()),
    GatedDeltaNet: (GatedDeltaNetMixer, ()),
    KDA: (KimiDeltaAttention, ()),
}
"""The module of each kind that is built, and which of `build_mixer`'s choices it takes."""


def build_mixer(mixer: Mixer, hidden: int, *, rope: bool, impl: str = "auto", **settings: Any) -> nn.Module:
    """Return the module of `mixer`, [B, T, hidden] -> [B, T, hidden]; settings are device and dtype.

    rope: turn queries and keys by their positions, where the kind has such. impl: of power and linear attention and
    those with a fixed decay, as in `power_attention`. Raises InputError for a kind that is not built.
    """
    found = BUILT.get(type(mixer))  # Exactly: kinds that derive from another need more than its projections.
    if found is None:
        kinds = ", ".join(str(kind.__struct_config__.tag) for kind in BUILT)
        raise InputError(f"{mixer.describe()} layers are not built; built are {kinds}")
    module, takes = found
    choices = {name: value for name, value in (("rope", rope), ("impl", impl)) if name in takes}
    return module(mixer, hidden, **choices, **settings)
