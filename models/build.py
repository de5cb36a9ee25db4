"""A layer or a model of a spec as an nn.Module, with as many parameters as the accounting says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from powerplan.errors import InputError
from powerplan.ffn import MLP
from powerplan.models.decoder import Decoder
from powerplan.models.experts import MixtureOfExperts
from powerplan.models.layers import DenseMLP, ResidualLayer
from powerplan.models.mixers import build_mixer
from powerplan.spec import Layer, ModelSpec


def build_layer(
    spec: ModelSpec,
    layer: Layer | int = 0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> ResidualLayer:
    """Return one residual layer of `spec`, [B, T, hidden] -> [B, T, hidden], its weights torch's random ones.

    layer: a Layer of the spec, or its position from 0. impl: of power and linear attention, as in `power_attention`.
    Queries and keys get RoPE where the model has no table of learned positions. Raises InputError for a position that
    the model does not have, and for kinds of mixers that are not built.
    """
    if isinstance(layer, int):
        layer = _at(spec, layer)
    settings: dict[str, Any] = {"device": device, "dtype": dtype}
    hidden, rope = spec.hidden_size, spec.position_embeddings is None
    mixer = None if layer.mixer is None else build_mixer(layer.mixer, hidden, rope=rope, impl=impl, **settings)
    ffn: nn.Module | None = None
    if isinstance(layer.ffn, MLP):
        ffn = DenseMLP(layer.ffn, hidden, **settings)
    elif layer.ffn is not None:
        ffn = MixtureOfExperts(layer.ffn, hidden, **settings)
    return ResidualLayer(mixer, ffn, spec.norm, hidden, **settings)


def build_model(
    spec: ModelSpec,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Decoder:
    """Return the language model of `spec`: tokens [B, T] -> logits [B, T, vocabulary].

    Its weights are initialised by `Decoder.init_weights`, unless `device` is "meta", where they take no memory: then
    `model.to_empty(device=...)` and `init_weights` follow, after sharding for example. Raises InputError as
    `build_layer` does.
    """
    settings: dict[str, Any] = {"device": device, "dtype": dtype}
    layers = {use.layer: use.positions for use in spec.layer_uses()}
    order = {position: layer for layer, spans in layers.items() for span in spans for position in span}
    built = [build_layer(spec, order[position], impl=impl, **settings) for position in range(spec.layer_count)]
    model = Decoder(spec, built, **settings)
    if torch.device(device or "cpu").type != "meta":
        model.init_weights()
    return model


def _at(spec: ModelSpec, position: int) -> Layer:
    for use in spec.layer_uses():
        if any(position in span for span in use.positions):
            return use.layer
    raise InputError(f"layer {position} is out of range; {spec.name} has layers 0 to {spec.layer_count - 1:,}")
