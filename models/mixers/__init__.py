"""Sequence mixers as modules, one class per kind of powerplan.mixers. A new kind is a class and an entry in BUILT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from powerplan.errors import InputError
from powerplan.mixers import (
    DSA,
    GLA,
    GSA,
    KDA,
    MLA,
    NSA,
    RWKV7,
    Attention,
    DeltaNet,
    Forgetting,
    GatedDeltaNet,
    Lightning,
    Linear,
    LogLinear,
    Mamba1,
    Mamba2,
    Mixer,
    MoBA,
    Power,
    RetNet,
    SparseStateExpansion,
)
from powerplan.models.mixers.attention import SoftmaxAttention
from powerplan.models.mixers.base import check_kernel_settings
from powerplan.models.mixers.delta import DeltaNetMixer, GatedDeltaNetMixer, GatedLinearAttention, KimiDeltaAttention
from powerplan.models.mixers.dsa import SparseLatentAttention
from powerplan.models.mixers.forgetting import ForgettingAttention
from powerplan.models.mixers.mamba import LogLinearMixer, Mamba1Mixer, Mamba2Mixer
from powerplan.models.mixers.mla import LatentAttention
from powerplan.models.mixers.moba import MixtureOfBlocks
from powerplan.models.mixers.nsa import NativeSparseAttention
from powerplan.models.mixers.partitions import PartitionedAttention
from powerplan.models.mixers.power import PowerAttention
from powerplan.models.mixers.retention import LightningAttention, Retention
from powerplan.models.mixers.rwkv import RWKV7Mixer
from powerplan.models.mixers.slots import GatedSlotAttention
from powerplan.rope import Rope

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
    Mamba1: (Mamba1Mixer, ()),
    Mamba2: (Mamba2Mixer, ()),
    RWKV7: (RWKV7Mixer, ()),
    GSA: (GatedSlotAttention, ()),
    SparseStateExpansion: (PartitionedAttention, ()),
    LogLinear: (LogLinearMixer, ()),
    Forgetting: (ForgettingAttention, ()),
    MoBA: (MixtureOfBlocks, ("rope",)),
    NSA: (NativeSparseAttention, ("rope",)),
    DSA: (SparseLatentAttention, ("rope",)),
}
"""The module class of each kind that can be built, and which of the arguments rope and impl it takes."""

UNBUILT: Mapping[type[Mixer], tuple[str, ...]] = {
    Attention: ("shared_kv", "uncached", "keys_as_values", "differential"),
    MLA: ("output_gate",),
    Forgetting: ("sinks", "shared_kv", "uncached", "keys_as_values", "differential"),
    KDA: ("full_rank",),
    DSA: ("output_gate", "shared_index"),
    Mamba1: ("shared_size",),
}
"""Fields that planning counts and no module has."""


def unbuilt_field(mixer: Mixer) -> str | None:
    """Return the field of UNBUILT that a mixer sets, or None."""
    fields = UNBUILT.get(type(mixer), ())
    return next((field for field in fields if getattr(mixer, field) not in (False, None, "none")), None)


def build_mixer(
    mixer: Mixer, hidden_size: int, *, rope: Rope | None, impl: str = "auto", **factory_kwargs: Any
) -> nn.Module:
    """Return the module of a mixer, [B, T, hidden_size] -> [B, T, hidden_size].

    Args:
        mixer: The mixer of a spec.
        hidden_size: Features of a token.
        rope: How queries and keys are rotated, in kinds that have RoPE. None: they are not.
        impl: Implementation of power, linear and fixed-decay attention, as in `power_attention`.
        **factory_kwargs: device and dtype.

    Raises:
        InputError: The kind of mixer cannot be built, or there is no such implementation.
    """
    check_kernel_settings(impl)
    entry = BUILT.get(type(mixer))  # The exact class: kinds that derive from another one need more than its weights.
    if entry is None:
        kinds = ", ".join(str(kind.__struct_config__.tag) for kind in BUILT)
        raise InputError(f"{mixer.describe()} layers are not built; built are {kinds}")
    if field := unbuilt_field(mixer):
        raise InputError(f"{mixer.kind} layers with {field} are not built")
    module_class, accepted = entry
    options = {name: value for name, value in (("rope", rope), ("impl", impl)) if name in accepted}
    return module_class(mixer, hidden_size, **options, **factory_kwargs)
