"""Layers and language models as plain nn.Modules, built from a spec, and the model catalogue (YAML under catalogue/).

What users import is named here:
    build_layer, build_model    a layer or a model of a spec (docs/models.md)
    Decoder                     the class of the models
    Cache, Slot                 memory of a model, and of one layer, for decoding token by token
    generate                    sampling
    use_power_attention, power_class, register_power_attention, PowerCache
                                power attention in models of transformers (docs/transformers.md)

Importing this package loads no torch and no transformers. The first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerplan.models.build import build_layer, build_model
    from powerplan.models.cache import Cache, Slot
    from powerplan.models.decoder import Decoder
    from powerplan.models.sampling import generate
    from powerplan.models.transformers import (
        PowerCache,
        power_class,
        register_power_attention,
        use_power_attention,
    )

_MODULES = {
    "Cache": "cache",
    "Decoder": "decoder",
    "PowerCache": "transformers",
    "Slot": "cache",
    "build_layer": "build",
    "build_model": "build",
    "generate": "sampling",
    "power_class": "transformers",
    "register_power_attention": "transformers",
    "use_power_attention": "transformers",
}
"""The module of this package that defines each public name."""

_REQUIREMENTS = {"torch": "torch", "transformers": "'transformers>=5.5'"}
"""What pip installs for each package that these modules need."""

__all__ = [
    "Cache",
    "Decoder",
    "PowerCache",
    "Slot",
    "build_layer",
    "build_model",
    "generate",
    "power_class",
    "register_power_attention",
    "use_power_attention",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use; raises ImportError where torch or transformers is not installed."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from importlib.util import find_spec

    module = _MODULES[name]
    for package in ("torch", "transformers") if module == "transformers" else ("torch",):
        if find_spec(package) is None:
            reason = f"{package}, and it is not installed: pip install {_REQUIREMENTS[package]}"
            raise ImportError(f"powerplan.models.{name} needs {reason}")
    return getattr(import_module(f"{__name__}.{module}"), name)
