"""Power attention: softmax attention's interface, a state of constant size, cost linear in the context.

Importing this package loads no torch; its names do, at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerplan.kernels.api import empty_state, power_attention, power_attention_step
    from powerplan.kernels.embedding import spow, tiled_spow
    from powerplan.kernels.state import PowerState

__all__ = ["PowerState", "empty_state", "power_attention", "power_attention_step", "spow", "tiled_spow"]

_HOMES = {"PowerState": "state", "spow": "embedding", "tiled_spow": "embedding"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ImportError(f"powerplan.kernels.{name} needs torch, and it is not installed: pip install torch")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
