"""Layers as plain nn.Modules, built from a spec, and the model catalogue (YAML data under catalogue/).

Importing this package loads no torch; its names do, at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerplan.models.build import build_layer, build_model
    from powerplan.models.cache import Cache, Slot
    from powerplan.models.decoder import Decoder
    from powerplan.models.sampling import generate

_HOMES = {
    "Cache": "cache",
    "Decoder": "decoder",
    "Slot": "cache",
    "build_layer": "build",
    "build_model": "build",
    "generate": "sampling",
}
__all__ = ["Cache", "Decoder", "Slot", "build_layer", "build_model", "generate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ImportError(f"powerplan.models.{name} needs torch, and it is not installed: pip install torch")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
