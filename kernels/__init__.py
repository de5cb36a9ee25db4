"""Power attention: softmax attention's interface, with a state of constant size and a cost linear in the context.

What to call:
    power_attention       attention over whole sequences, with gradients
    power_attention_step  one more token of decoding
    power_state           what a stretch of tokens leaves behind, without queries
    ContextParallel       how sequences lie on the ranks of a process group: power_attention(..., cp=plan)
    PowerState            what is remembered of a sequence, passed between calls
    empty_state           the PowerState of sequences that have not begun
    spow, tiled_spow      the symmetric power embeddings phi, with phi(q).phi(k) = (q.k)^p

Importing this package loads no torch; each of these names does, when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerplan.kernels.api import empty_state, power_attention, power_attention_step
    from powerplan.kernels.distributed.plan import ContextParallel
    from powerplan.kernels.embedding import spow, tiled_spow
    from powerplan.kernels.staged import power_state
    from powerplan.kernels.state import PowerState

__all__ = [
    "ContextParallel",
    "PowerState",
    "empty_state",
    "power_attention",
    "power_attention_step",
    "power_state",
    "spow",
    "tiled_spow",
]

_MODULES = {
    "ContextParallel": "distributed.plan",
    "PowerState": "state",
    "power_state": "staged",
    "spow": "embedding",
    "tiled_spow": "embedding",
}
"""The modules of names that are not in api.py."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ImportError(f"powerplan.kernels.{name} needs torch, and it is not installed: pip install torch")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'api')}"), name)
