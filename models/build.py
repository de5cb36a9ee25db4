"""Build a layer or a model of a spec as an nn.Module. It has as many parameters as the accounting says."""

from __future__ import annotations

from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from powerplan.errors import InputError
from powerplan.ffn import MLP, MoE
from powerplan.models.decoder import Decoder
from powerplan.models.experts import MixtureOfExperts
from powerplan.models.layers import DenseMLP, ResidualLayer
from powerplan.models.mixers import build_mixer
from powerplan.rope import Rope
from powerplan.spec import Layer, ModelSpec


def build_layer(
    spec: ModelSpec,
    layer: Layer | int = 0,
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
    if isinstance(layer, int):
        return _build_layer(spec, _layer_at(spec, layer), spec.rope_at(layer), impl, device=device, dtype=dtype)
    return _build_layer(spec, layer, spec.rope_of(layer), impl, device=device, dtype=dtype)


def _build_layer(spec: ModelSpec, layer: Layer, rope: Rope | None, impl: str, **factory_kwargs: Any) -> ResidualLayer:
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
    return ResidualLayer(mixer, ffn, norm, hidden_size, **factory_kwargs)


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
    if spec.extras:
        raise InputError(f"{spec.name} has extras ({spec.extras[0].name}), which are not built")
    factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
    layer_at = {position: use.layer for use in spec.layer_uses() for span in use.positions for position in span}
    layers = [
        _build_layer(spec, layer_at[position], spec.rope_at(position), impl, **factory_kwargs)
        for position in range(spec.layer_count)
    ]
    model = Decoder(spec, layers, **factory_kwargs)
    if torch.device(device or "cpu").type != "meta":
        model.init_weights()
    return model


def _layer_at(spec: ModelSpec, position: int) -> Layer:
    for use in spec.layer_uses():
        if any(position in span for span in use.positions):
            return use.layer
    raise InputError(f"layer {position} is out of range; {spec.name} has layers 0 to {spec.layer_count - 1:,}")
