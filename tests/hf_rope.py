"""What the models of transformers rotate by: the cosines that each of their layers applies, while a model runs."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn


class Rotations:
    """The cosines [T, pairs] that each layer of a model applied to its queries or keys, by its index.

    Functions that rotate are replaced in the module of the model's class for the time of a `with`.
    """

    def __init__(self, model: Any) -> None:
        self.by_layer: dict[int, list[Tensor]] = {}
        self._layer = -1
        self._module = sys.modules[type(model).__module__]
        self._functions = {
            name: function
            for name, function in vars(self._module).items()
            if name.startswith(("apply_rotary", "apply_multimodal_rotary")) and inspect.isfunction(function)
        }
        self._hooks: list[Any] = []
        self._model = model

    def __enter__(self) -> Rotations:
        lists = [module for module in self._model.modules() if isinstance(module, nn.ModuleList)]
        layers = next(module for module in lists if len(module) > 1 and len(list(module[0].children())) > 1)
        for index, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(lambda *_, index=index: setattr(self, "_layer", index)))
        for name, function in self._functions.items():
            setattr(self._module, name, self._recorded(function))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for name, function in self._functions.items():
            setattr(self._module, name, function)

    def _recorded(self, function: Any) -> Any:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            cosines = given["cos"] if "cos" in given else given["freqs_cis"]
            self.by_layer.setdefault(self._layer, []).append(cosines.detach())
            return function(*args, **kwargs)

        return call


def sorted_cosines(cosines: Tensor, tokens: int) -> Tensor:
    """Return the cosines of each token once for each pair of features, sorted: layouts of pairs differ by family."""
    if cosines.is_complex():
        return cosines.real.reshape(-1, tokens, cosines.shape[-1])[0].sort(-1).values
    flat = cosines.reshape(-1, tokens, cosines.shape[-1])[0].sort(-1).values
    pairs = flat[:, ::2]
    return pairs if torch.equal(pairs, flat[:, 1::2]) else flat
