"""Checkpoints of recurrent state, from which a prompt goes on that begins as an earlier one did."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from powerplan.accounting import Accounting
from powerplan.dtypes import Dtypes


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one sequence.

    every: tokens from one to the next. context: tokens of the sequence. each: bytes of one. count: how many there are.
    """

    every: int
    context: int
    each: Fraction

    @property
    def count(self) -> int:
        return self.context // self.every

    @property
    def bytes(self) -> Fraction:
        return self.count * self.each

    @property
    def resumed(self) -> int:
        """Tokens of the sequence that a prompt which begins with all of it need not read again.

        It goes on from the last checkpoint; caches that keep every token can be cut anywhere.
        """
        return self.count * self.every if self.each else self.context


def checkpoints_of(accounting: Accounting, context: int, dtypes: Dtypes, every: int) -> Checkpoints:
    """Return the checkpoints of a sequence: every state at that point that is not a part of the state at the end.

    A checkpoint holds recurrent states, inputs of short convolutions, and of a window the last tokens: as many as it
    keeps, and no more than lie between two checkpoints. Caches that grow hold every prefix already. States that grow
    with the logarithm of the context count as at its end.
    """
    each = Fraction(0)
    for mixer, count in accounting.spec.mixer_counts():
        if not mixer.entry:
            each += count * mixer.state_bytes(context, dtypes.cache_bytes, dtypes.state_bytes)
        elif not mixer.grows:
            each += count * mixer.state_bytes(min(context, every), dtypes.cache_bytes, dtypes.state_bytes)
    return Checkpoints(every, context, each)
