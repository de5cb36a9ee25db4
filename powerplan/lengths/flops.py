"""The state FLOPs of documents that attend to themselves alone, and how they compare with whole sequences.

With document masks a token attends to its own document, and recurrent state starts anew with each. Without them a
sequence of packed documents is one sequence, in which every token attends to all before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

from powerplan.accounting import Accounting
from powerplan.lengths.histogram import Lengths
from powerplan.lengths.packing import Packing, packings
from powerplan.mixers.base import Mixer
from powerplan.mixers.formulas import Convention, Rational, total


@lru_cache(256)
def mean_state_flops(mixer: Mixer, pieces: Lengths, convention: Convention) -> Fraction:
    """Return the state FLOPs of one layer per token, over all tokens of documents that attend to themselves alone."""
    flops: Rational = 0
    for length, count in pieces.counts:
        flops += length * count * total(mixer.state_flops_terms(length, convention))
    return Fraction(flops) / pieces.tokens


@dataclass(frozen=True)
class DocumentRow:
    """The numbers of a model that trains on documents in sequences of one context.

    lengths: the documents; what is longer than the context is cut into pieces of it.
    """

    accounting: Accounting
    lengths: Lengths
    context: int

    @cached_property
    def pieces(self) -> Lengths:
        """The documents as they stand in sequences."""
        return self.lengths.cut(self.context)

    @cached_property
    def state_flops_per_token(self) -> Fraction:
        """Forward state FLOPs per token with document masks, averaged over all tokens."""
        convention = self.accounting.convention
        mixers = self.accounting.spec.mixer_counts()
        return sum((mean_state_flops(mixer, self.pieces, convention) * count for mixer, count in mixers), Fraction(0))

    @cached_property
    def unmasked_state_flops_per_token(self) -> Fraction:
        """The same without masks: those of a whole sequence of the context."""
        return self.accounting.state_flops_per_token(self.context)

    @property
    def flops_per_token(self) -> Fraction:
        """Forward FLOPs per token with document masks, weights and state."""
        return self.accounting.weight_flops_per_token + self.state_flops_per_token

    @property
    def unmasked_flops_per_token(self) -> Fraction:
        """The same without masks."""
        return self.accounting.weight_flops_per_token + self.unmasked_state_flops_per_token

    @property
    def wsfr(self) -> Fraction | None:
        """The weight-state FLOP ratio with document masks; None for a model without state."""
        state = self.state_flops_per_token
        return Fraction(self.accounting.weight_flops_per_token) / state if state else None

    @property
    def saved(self) -> Fraction:
        """The share of all FLOPs that masks save; below 0 where they cost some, as chunks that are not full can."""
        return 1 - self.flops_per_token / self.unmasked_flops_per_token

    @cached_property
    def equal_context(self) -> int | None:
        """The longest context at which a whole sequence takes no more state FLOPs per token than these documents.

        None where FLOPs do not depend on the context, or where it is not computed (`Accounting.longest_is_found`).
        """
        return self.accounting.longest_context(self.state_flops_per_token)

    @cached_property
    def packings(self) -> tuple[Packing, Packing, Packing]:
        """What the documents fill: one a sequence, packed whole, and as a stream."""
        return packings(self.lengths, self.context)
