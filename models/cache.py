"""What a model remembers of the tokens so far, one slot per layer: keys and values, power states, convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from powerplan.errors import InputError


class GrowingBuffer:
    """Entries [B, S, ...] of the last S tokens, in a buffer with free space: appending a token copies no other entry.

    A full buffer is replaced by one of twice the needed length, so that copying costs a constant amount per token. With
    gradients enabled every append makes a new buffer, because autograd must keep the old one.
    """

    def __init__(self, entries: Tensor) -> None:
        self.buffer, self.start, self.stop = entries, 0, entries.shape[1]

    @property
    def entries(self) -> Tensor:
        """All entries in order, [B, S, ...]: a view of the buffer."""
        return self.buffer[:, self.start : self.stop]

    def append(self, x: Tensor) -> Tensor:
        """Append the entries of the next tokens [B, T, ...], and return all entries [B, S + T, ...]."""
        length, added = self.stop - self.start, x.shape[1]
        if x.shape[0] != self.buffer.shape[0]:
            raise InputError(f"the cache remembers {self.buffer.shape[0]} sequences, and x has {x.shape[0]}")
        if torch.is_grad_enabled():
            self.buffer, self.start, self.stop = torch.cat((self.entries, x), 1), 0, length + added
            return self.buffer
        # A tensor made in inference mode cannot be written to outside of it.
        is_read_only = self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        if is_read_only or self.stop + added > self.buffer.shape[1]:
            larger = x.new_empty(x.shape[0], 2 * (length + added), *x.shape[2:])
            larger[:, :length] = self.entries
            self.buffer, self.start, self.stop = larger, 0, length
        self.buffer[:, self.stop : self.stop + added] = x
        self.stop += added
        return self.entries

    def keep_last(self, window: int | None) -> None:
        """Drop all entries but the last `window`; None drops nothing."""
        if window is None:
            return
        self.start = max(self.start, self.stop - window)
        if self.start > 2 * window:  # Mostly dropped entries, as after a long prompt: free their memory.
            self.buffer, self.start, self.stop = self.entries.clone(), 0, self.stop - self.start


@dataclass(repr=False)
class Slot:
    """The memory of one mixer.

    Attributes:
        tokens: Tokens of each sequence that the mixer has processed.
        state: What the mixer keeps of them; its type is the mixer's own. None before the first token.
        ffn: The last input [B, 1, m] of an FFN with a token shift (RWKV-7). None for all others.
    """

    tokens: int = 0
    state: Any = None
    ffn: Tensor | None = None

    def __repr__(self) -> str:
        return f"<Slot of {self.tokens:,} tokens, {type(self.state).__name__}>"


@dataclass(repr=False)
class Cache:
    """The memory of a model over B sequences of equal length.

    An empty cache is filled by the first call of the model that takes it. Its size is constant for recurrent mixers,
    grows with the context for attention, and grows up to the window for windowed attention.

    Attributes:
        slots: One slot per layer, in order; empty before the first call.
    """

    slots: list[Slot] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<Cache of {self.tokens:,} tokens in {len(self.slots):,} layers, {self.nbytes:,} bytes>"

    def select(self, rows: Tensor) -> Cache:
        """Return a cache of these rows of the batch, as beam search reorders them, or copies of one prompt's.

        Args:
            rows: The rows [N], int64 on the cache's device, in any order and with repeats: sequence i of the new cache
                is sequence rows[i] of this one.

        Returns:
            A cache of N sequences. This one does not change, and they share no memory.

        Raises:
            InputError: `rows` is no list of rows.
        """
        if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
            given = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            raise InputError(f"rows must be a tensor [N] of int64, and is {given}")
        return Cache([Slot(slot.tokens, _selected(slot.state, rows), _selected(slot.ffn, rows)) for slot in self.slots])

    @property
    def tokens(self) -> int:
        """Tokens of each sequence so far."""
        return max((slot.tokens for slot in self.slots), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the slots, without the free space of buffers."""
        return sum(x.numel() * x.element_size() for slot in self.slots for x in _tensors((slot.state, slot.ffn)))


def _selected(state: Any, rows: Tensor) -> Any:
    """Return what a slot holds, for these rows of the batch."""
    if isinstance(state, Tensor):
        return state.index_select(0, rows)
    if isinstance(state, GrowingBuffer):
        return GrowingBuffer(state.entries.index_select(0, rows))
    if isinstance(state, tuple):
        parts = [_selected(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, GrowingBuffer):
        yield state.entries
    elif isinstance(state, tuple):
        for part in state:
            yield from _tensors(part)
