"""Build a layer or a model of a spec as an nn.Module. It has as many parameters as the accounting says."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any, SupportsIndex

import torch
from msgspec.structs import replace
from torch import nn

from powerplan.errors import InputError, shown
from powerplan.ffn import MLP, MoE
from powerplan.mixers import RWKV7
from powerplan.models.decoder import Decoder
from powerplan.models.experts import MixtureOfExperts
from powerplan.models.layers import DenseMLP, ResidualLayer, ValueResidualLayer
from powerplan.models.mixers import build_mixer
from powerplan.models.shift import ShiftedFFN
from powerplan.rope import Rope
from powerplan.spec import Layer, ModelSpec, check_spec


def build_layer(
    spec: ModelSpec,
    layer: Layer | SupportsIndex = 0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> ResidualLayer:
    """Build one residual layer of a model, [B, T, hidden_size] -> [B, T, hidden_size].

    Its weights are those that torch draws for each module. Queries and keys are rotated as the spec's `rope` says;
    without it, by the base 10,000, unless the spec has a table of learned positions.

    Args:
        spec: The model that the layer belongs to: hidden size, norms and position embeddings come from it.
        layer: A layer of the spec, or its position, from 0. RoPE is that of its position, or the layer's first one.
        device: Where the weights are made. None stands for torch's default.
        dtype: Dtype of the weights. None stands for torch's default.
        impl: Implementation of power, linear and fixed-decay attention, as in `powerplan.kernels.power_attention`.

    Returns:
        The layer.

    Raises:
        InputError: The model has no such position, the mixer or the number of norms cannot be built, or there is no
            such implementation.
    """
    check_spec(spec)
    if not isinstance(layer, Layer):
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise InputError(f"layer must be a Layer or the position of one, and is {shown(layer)}")
        position = index(layer)
        return _build_layer(spec, _layer_at(spec, position), spec.rope_at(position), impl, device=device, dtype=dtype)
    return _build_layer(spec, layer, spec.rope_of(layer), impl, device=device, dtype=dtype)


def _build_layer(
    spec: ModelSpec, layer: Layer, rope: Rope | None, impl: str, hands_values: bool = False, **factory_kwargs: Any
) -> ResidualLayer:
    if layer.tied or layer.extras:
        raise InputError("layers that are tied or have extras are not built")
    norm = spec.norm if layer.norms is None else replace(spec.norm, per_layer=layer.norms)
    hidden_size = spec.hidden_size
    mixer = None
    if layer.mixer is not None:
        mixer = build_mixer(layer.mixer, hidden_size, rope=rope, impl=impl, **factory_kwargs)
    ffn: nn.Module | None = None
    if isinstance(layer.ffn, MLP):
        ffn = DenseMLP(layer.ffn, hidden_size, **factory_kwargs)
    elif isinstance(layer.ffn, MoE):
        if layer.ffn.latent_size or layer.ffn.zero_experts:
            raise InputError("experts with latent_size or zero_experts are not built")
        ffn = MixtureOfExperts(layer.ffn, hidden_size, **factory_kwargs)
    elif layer.ffn is not None:
        raise InputError(f"{layer.ffn.kind} layers are not built")
    if isinstance(layer.mixer, RWKV7) and layer.mixer.channel_mix:
        if ffn is None:
            raise InputError("rwkv7 layers with channel_mix and no ffn are not built: channel_mix is a part of the ffn")
        ffn = ShiftedFFN(ffn, hidden_size, **factory_kwargs)
    layer_class = ValueResidualLayer if hands_values else ResidualLayer
    return layer_class(mixer, ffn, norm, hidden_size, **factory_kwargs)


def build_model(
    spec: ModelSpec,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Decoder:
    """Build the language model of a spec: tokens [B, T] -> logits [B, T, vocab_size].

    `Decoder.init_weights` draws its weights, except on the meta device, where weights take no memory. From there
    `model.to_empty(device=...)` and `model.init_weights()` follow, for example after sharding.

    Args:
        spec: The model.
        device: Where the weights are made. None stands for torch's default.
        dtype: Dtype of the weights. None stands for torch's default.
        impl: Implementation of power, linear and fixed-decay attention, as in `powerplan.kernels.power_attention`.

    Returns:
        The model.

    Raises:
        InputError: A layer cannot be built, as in `build_layer`.
    """
    check_spec(spec)
    if spec.extras:
        raise InputError(f"{spec.name} has extras ({spec.extras[0].name}), which are not built")
    factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
    layer_at = {position: use.layer for use in spec.layer_uses() for span in use.positions for position in span}
    hand_values = _layers_that_hand_values(layer_at)
    layers = [
        _build_layer(spec, layer_at[position], spec.rope_at(position), impl, position in hand_values, **factory_kwargs)
        for position in range(spec.layer_count)
    ]
    model = Decoder(spec, layers, **factory_kwargs)
    if torch.device(device or "cpu").type != "meta":
        model.init_weights()
    return model


def _layers_that_hand_values(layer_at: Mapping[int, Layer]) -> set[int]:
    """Return the positions of all RWKV-7 layers where one of them mixes in the values of the first.

    Raises InputError where their values have different widths.
    """
    mixers = {at: layer_at[at].mixer for at in sorted(layer_at)}
    widths = {at: mixer.heads * mixer.v_head_dim for at, mixer in mixers.items() if isinstance(mixer, RWKV7)}
    if not any(isinstance(mixer, RWKV7) and mixer.value_rank for mixer in mixers.values()):
        return set()
    first = min(widths)
    for at, width in widths.items():
        if width != widths[first]:
            raise InputError(
                f"value_rank: layer {at} has values of {width:,} features, and layer {first}, whose values it takes, "
                f"of {widths[first]:,}"
            )
    return set(widths)


def _layer_at(spec: ModelSpec, position: int) -> Layer:
    for use in spec.layer_uses():
        if any(position in span for span in use.positions):
            return use.layer
    raise InputError(f"layer {position} is out of range; {spec.name} has layers 0 to {spec.layer_count - 1:,}")
