"""Sequence mixers as modules, one class per kind of powerplan.mixers. A new kind is one class and one entry here."""

from __future__ import annotations

from typing import Any

from torch import nn

from powerplan.errors import InputError
from powerplan.mixers import Attention, FeatureAttention, Mixer
from powerplan.models.mixers.attention import SoftmaxAttention
from powerplan.models.mixers.power import PowerAttention


def build_mixer(mixer: Mixer, hidden: int, *, rope: bool, impl: str = "auto", **settings: Any) -> nn.Module:
    """Return the module of `mixer`, [B, T, hidden] -> [B, T, hidden]; settings are device and dtype.

    rope: turn queries and keys by their positions. impl: of power and linear attention, as in `power_attention`.
    Raises InputError for a kind that is not built yet.
    """
    if type(mixer) is Attention:  # Other kinds derive from it, and need more than its projections.
        return SoftmaxAttention(mixer, hidden, rope=rope, **settings)
    if isinstance(mixer, FeatureAttention):
        return PowerAttention(mixer, hidden, rope=rope, impl=impl, **settings)
    raise InputError(f"{mixer.describe()} layers are not built yet; attention, windows, power and linear are")
