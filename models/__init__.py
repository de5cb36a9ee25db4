"""Layers as plain nn.Modules, built from a spec, and the model catalogue (YAML data under catalogue/).

Importing this package loads no torch; its names do, at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerplan.models.build import build_layer, build_model
    from powerplan.models.cache import Cache, Slot
    from powerplan.models.decoder import Decoder
    from powerplan.models.hf_attention import register_power_attention
    from powerplan.models.hf_cache import PowerCache
    from powerplan.models.hf_model import power_class, use_power_attention
    from powerplan.models.sampling import generate

_HOMES = {
    "Cache": "cache",
    "Decoder": "decoder",
    "PowerCache": "hf_cache",
    "Slot": "cache",
    "build_layer": "build",
    "build_model": "build",
    "generate": "sampling",
    "power_class": "hf_model",
    "register_power_attention": "hf_attention",
    "use_power_attention": "hf_model",
}
_NEEDS = {"torch": "torch", "transformers": "'transformers>=5'"}
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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from importlib.util import find_spec

    home = _HOMES[name]
    for package in ("torch", "transformers") if home.startswith("hf_") else ("torch",):
        if find_spec(package) is None:
            what = f"{package}, and it is not installed: pip install {_NEEDS[package]}"
            raise ImportError(f"powerplan.models.{name} needs {what}")
    return getattr(import_module(f"{__name__}.{home}"), name)
