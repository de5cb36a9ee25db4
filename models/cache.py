"""What a model remembers of the tokens so far: keys and values, power states, convolutions, one slot per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Slot:
    """Memory of one mixer: how many tokens it has met, and what it keeps of them (a tuple of tensors; None before)."""

    tokens: int = 0
    state: Any = None


@dataclass
class Cache:
    """Memory of a model over B sequences of equal length; a model fills it with the first tokens it is given.

    It is of constant size for recurrent mixers, grows with the context for attention, and up to the window for windows.
    """

    slots: list[Slot] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of each sequence so far."""
        return max((slot.tokens for slot in self.slots), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(x.numel() * x.element_size() for slot in self.slots for x in _tensors(slot.state))


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from _tensors(part)
