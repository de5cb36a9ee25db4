"""How long documents are: a histogram of whole lengths in tokens, and what is left of it in sequences of a context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate

from powerplan.errors import InputError
from powerplan.units import MAX_CONTEXT

MAX_DIFFERENT = 200_000
"""The most different lengths. FLOPs are counted at each: so many take 2 to 5 seconds for one model."""

MAX_DOCUMENTS = 10**15
"""The most documents."""


@dataclass(frozen=True)
class Lengths:
    """Documents by their lengths.

    counts: pairs of a length in tokens and how many documents have it, the shortest first.
    label: where they come from, such as "docs.txt" or "lognormal:mean=4k,p99=32k".
    """

    counts: tuple[tuple[int, int], ...]
    label: str = "documents"

    @classmethod
    def of(cls, counts: Mapping[int, int], label: str = "documents", where: str | None = None) -> Lengths:
        """Return the documents of a mapping from lengths in tokens to numbers of documents.

        Raises:
            InputError: there is no document, there are more different lengths or documents than are counted, or one is
                out of range. The message begins with `where`.
        """
        if not counts:
            raise InputError("holds no lengths", where)
        if len(counts) > MAX_DIFFERENT:
            problem = f"has more than {MAX_DIFFERENT:,} different lengths; round them, as to multiples of 16"
            raise InputError(problem, where)
        found = tuple(sorted(counts.items()))
        if found[0][0] < 1:
            raise InputError(f"a document has 1 token or more, and one has {found[0][0]:,}", where)
        if found[-1][0] > MAX_CONTEXT:
            raise InputError(f"a document has {MAX_CONTEXT:,} tokens (2^50) at most, and one has more", where)
        if min(counts.values()) < 1:
            raise InputError("there are 1 or more documents of a length, and one length has less", where)
        if sum(counts.values()) > MAX_DOCUMENTS:
            raise InputError(f"has more than {MAX_DOCUMENTS:,} documents", where)
        return cls(found, label)

    @cached_property
    def documents(self) -> int:
        """How many documents there are."""
        return sum(count for _, count in self.counts)

    @cached_property
    def tokens(self) -> int:
        """The tokens of all documents."""
        return sum(length * count for length, count in self.counts)

    @property
    def mean(self) -> Fraction:
        """Tokens of a document, on average."""
        return Fraction(self.tokens, self.documents)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return self.counts[-1][0]

    def quantile(self, share: Fraction) -> int:
        """Return the shortest length that so large a share of all documents, above 0 and at most 1, do not exceed."""
        held = list(accumulate(count for _, count in self.counts))
        return self.counts[bisect_left(held, share * self.documents)][0]

    def token_quantile(self, share: Fraction) -> int:
        """Return the shortest length such that documents that do not exceed it hold so large a share of all tokens."""
        held = list(accumulate(length * count for length, count in self.counts))
        return self.counts[bisect_left(held, share * self.tokens)][0]

    def longer_than(self, context: int) -> int:
        """Return how many documents have more tokens than `context`."""
        return sum(count for length, count in self.counts if length > context)

    def cut(self, context: int) -> Lengths:
        """Return the pieces of documents in sequences of `context` tokens: what is longer is cut, and no token is lost.

        A document of more tokens becomes whole pieces of `context` tokens and one of what remains, as Best-fit Packing
        cuts them (Ding et al. 2024, arXiv 2404.10830).
        """
        return self if self.longest <= context else _cut(self, context)

    @cached_property
    def _hash(self) -> int:
        return hash((self.counts, self.label))

    def __hash__(self) -> int:
        """Return the hash, found once: that of many lengths takes milliseconds."""
        return self._hash


@lru_cache(64)
def _cut(lengths: Lengths, context: int) -> Lengths:
    pieces: dict[int, int] = {}
    for length, count in lengths.counts:
        whole, rest = divmod(length, context)
        if whole:
            pieces[context] = pieces.get(context, 0) + whole * count
        if rest:
            pieces[rest] = pieces.get(rest, 0) + count
    return Lengths(tuple(sorted(pieces.items())), lengths.label)
