"""What a model remembers of the tokens so far: keys and values, power states, convolutions, one slot per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from powerplan.errors import InputError


class Growing:
    """Entries [B, S, ...] of the last S tokens, in a buffer with room for more: one more token copies nothing else.

    The room is as much as is kept whenever it runs out. Under autograd every call makes a buffer of its own.
    """

    def __init__(self, entries: Tensor) -> None:
        self.buffer, self.start, self.stop = entries, 0, entries.shape[1]

    @property
    def entries(self) -> Tensor:
        """What is kept, [B, S, ...]."""
        return self.buffer[:, self.start : self.stop]

    def append(self, x: Tensor) -> Tensor:
        """Put the entries of the next tokens, [B, T, ...], behind those that are kept, and return them all."""
        kept, more = self.stop - self.start, x.shape[1]
        if x.shape[0] != self.buffer.shape[0]:
            raise InputError(f"the cache remembers {self.buffer.shape[0]} sequences, and x has {x.shape[0]}")
        if torch.is_grad_enabled():
            self.buffer, self.start, self.stop = torch.cat((self.entries, x), 1), 0, kept + more
            return self.buffer
        frozen = self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        if frozen or self.stop + more > self.buffer.shape[1]:
            larger = x.new_empty(x.shape[0], 2 * (kept + more), *x.shape[2:])
            larger[:, :kept] = self.entries
            self.buffer, self.start, self.stop = larger, 0, kept
        self.buffer[:, self.stop : self.stop + more] = x
        self.stop += more
        return self.entries

    def keep(self, window: int | None) -> None:
        """Forget all but the last `window` tokens; None keeps all."""
        if window is None:
            return
        self.start = max(self.start, self.stop - window)
        if self.start > 2 * window:  # A long first piece, of which little is kept.
            self.buffer, self.start, self.stop = self.entries.clone(), 0, self.stop - self.start


@dataclass
class Slot:
    """Memory of one mixer: how many tokens it has met, and what it keeps of them (None before)."""

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
    elif isinstance(state, Growing):
        yield state.entries
    elif isinstance(state, tuple):
        for part in state:
            yield from _tensors(part)
