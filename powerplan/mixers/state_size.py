"""How large the state of a layer is, by how its parts are kept, and what a decoded token moves of it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from powerplan.mixers.formulas import Rational


@dataclass(frozen=True)
class StateSize:
    """State of one sequence in one layer, in elements.

    cache: keys and values, which grow with the context; in the cache's dtype.
    entry: what one token appends to the cache.
    recurrent: the recurrent state, in a dtype of its own; every token reads and writes it.
    recent: inputs of the last tokens, kept for short convolutions and token shifts; in the cache's dtype.
    looked_up: the part of `cache` that one token reads; None stands for all of it.
    touched: the part of `recurrent` that one token reads and writes; None stands for all of it.
    waiting: what one token writes to and reads from the cache beside that: inputs that wait to be compressed.
    """

    cache: int = 0
    entry: int = 0
    recurrent: int = 0
    recent: int = 0
    looked_up: int | None = None
    touched: int | None = None
    waiting: int = 0

    @property
    def elements(self) -> int:
        return self.cache + self.recurrent + self.recent

    def bytes(self, cache_bytes: Fraction, state_bytes: Rational) -> Fraction:
        """Return the bytes of the state, given the bytes per element of the cache and of the recurrent state."""
        return (self.cache + self.recent) * cache_bytes + self.recurrent * state_bytes

    def decode_bytes(self, cache_bytes: Fraction, state_bytes: Rational) -> Fraction:
        """Return the bytes that are read and written to decode one token, as `Mixer.decode_bytes` says."""
        touched = self.recurrent if self.touched is None else self.touched
        return self.decode_cache_bytes(cache_bytes) + 2 * self.recent * cache_bytes + 2 * touched * state_bytes

    def decode_cache_bytes(self, cache_bytes: Fraction) -> Fraction:
        """Return the part of `decode_bytes` that belongs to the cache."""
        read = self.cache if self.looked_up is None else self.looked_up
        return (read + self.entry + self.waiting) * cache_bytes
