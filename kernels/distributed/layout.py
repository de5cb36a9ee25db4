"""Which rank holds which tokens, and how the parts of a sequence follow each other over the ranks.

Sequences lie end to end on one axis of tokens. A rank holds fragments of this axis: ranges of tokens, in an order of
its own. A fragment is cut into pieces where sequences begin. Of a fragment only the first piece may continue a
sequence, and only the last one may go on in a later fragment, so that each end of a fragment hands over one state at
most.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

Range = tuple[int, int]
"""The first token of a range, and the one behind its last."""

LAYOUTS = ("contiguous", "zigzag")
"""The layouts that have a name."""


@dataclass(frozen=True)
class Piece:
    """The tokens start : stop of one sequence, on the axis of all tokens.

    begins, ends: whether they are the first and the last tokens of their sequence.
    """

    sequence: int
    start: int
    stop: int
    begins: bool
    ends: bool


@dataclass(frozen=True)
class Fragment:
    """Neighbouring tokens on one rank.

    Attributes:
        rank: Who holds it, by the rank in the group.
        first: Its first token among those of its rank.
        pieces: Its tokens, by sequence.
        before: How many fragments the sequence of its first piece has before this one; 0 where it begins here.
        after: How many fragments the sequence of its last piece has after this one; 0 where it ends here.
    """

    rank: int
    first: int
    pieces: tuple[Piece, ...]
    before: int
    after: int

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def stop(self) -> int:
        return self.pieces[-1].stop

    @property
    def passes_through(self) -> bool:
        """Whether a state goes in at one end and out at the other: one piece of a sequence, and no end of it."""
        return self.before > 0 and self.after > 0 and len(self.pieces) == 1

    def local(self, piece: Piece) -> slice:
        """Return the tokens of a piece among those of the rank."""
        return slice(self.first + piece.start - self.start, self.first + piece.stop - self.start)


@dataclass(frozen=True)
class Layout:
    """All fragments, in the order of their tokens; a fragment is named by its place here.

    Attributes:
        ranks: How many ranks there are.
        bounds: [N + 1], where the N sequences begin and end.
        ranges: The tokens of each rank, in its own order.
        fragments: The fragments that have tokens.
    """

    ranks: int
    bounds: tuple[int, ...]
    ranges: tuple[tuple[Range, ...], ...]
    fragments: tuple[Fragment, ...]

    @property
    def tokens(self) -> int:
        return self.bounds[-1]

    @property
    def sequences(self) -> int:
        return len(self.bounds) - 1

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence."""
        return max(stop - start for start, stop in pairwise(self.bounds))

    def of_rank(self, rank: int) -> list[int]:
        """Return the fragments of a rank, in the rank's own order."""
        return self._by_rank[rank]

    @cached_property
    def _by_rank(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self.ranks)]
        for index, fragment in enumerate(self.fragments):
            found[fragment.rank].append(index)
        return [sorted(own, key=lambda index: self.fragments[index].first) for own in found]

    def senders(self, rank: int, reverse: bool) -> list[int]:
        """Return the fragments of a rank with something for later ones; with `reverse`, for earlier ones."""
        return [index for index in self.of_rank(rank) if self.distance(index, not reverse)]

    def receivers(self, rank: int, reverse: bool) -> list[int]:
        """Return the fragments of a rank that earlier ones have something for; with `reverse`, later ones."""
        return self.senders(rank, not reverse)

    def distance(self, index: int, reverse: bool) -> int:
        """Return how many fragments before a fragment its first sequence has; with `reverse`, after it its last one."""
        return self.fragments[index].after if reverse else self.fragments[index].before

    @cached_property
    def longest(self) -> int:
        """The most fragments that stand before another one in its sequence; 0 where nothing is handed over."""
        return max(fragment.before for fragment in self.fragments)


def named_ranges(layout: str, tokens: int, ranks: int) -> tuple[tuple[Range, ...], ...]:
    """Return the ranges of each rank for a layout with a name.

    "contiguous" cuts the tokens in as many ranges as there are ranks. "zigzag" cuts them in twice as many, and rank i
    gets the i-th from the front and the i-th from the back. The first ranges have one token more where they must.
    """
    parts = ranks if layout == "contiguous" else 2 * ranks
    size, rest = divmod(tokens, parts)
    ends = list(accumulate((size + (part < rest) for part in range(parts)), initial=0))
    ranges = list(pairwise(ends))
    if layout == "contiguous":
        return tuple((own,) for own in ranges)
    return tuple((ranges[rank], ranges[-1 - rank]) for rank in range(ranks))


def make_layout(bounds: Sequence[int], ranges: Sequence[Sequence[Range]]) -> Layout:
    """Return the layout of sequences bounds[i] : bounds[i + 1] over the ranges of each rank.

    Raises:
        ValueError: The ranges do not hold every token once.
    """
    _check_ranges(bounds[-1], ranges)
    found = []
    for rank, own in enumerate(ranges):
        first = 0
        for start, stop in own:
            if stop > start:
                found.append((rank, first, _pieces(bounds, start, stop)))
            first += stop - start
    found.sort(key=lambda fragment: fragment[2][0].start)
    before, after = [0] * len(found), [0] * len(found)
    for index in range(1, len(found)):
        pieces = found[index - 1][2]
        if not found[index][2][0].begins:
            before[index] = 1 + (before[index - 1] if len(pieces) == 1 else 0)
    for index in reversed(range(len(found) - 1)):
        pieces = found[index + 1][2]
        if not found[index][2][-1].ends:
            after[index] = 1 + (after[index + 1] if len(pieces) == 1 else 0)
    fragments = [Fragment(*parts, *counts) for parts, *counts in zip(found, before, after, strict=True)]
    return Layout(len(ranges), tuple(bounds), tuple(tuple(own) for own in ranges), tuple(fragments))


def _pieces(bounds: Sequence[int], start: int, stop: int) -> tuple[Piece, ...]:
    pieces = []
    for sequence in range(bisect_right(bounds, start) - 1, len(bounds) - 1):
        first, last = max(start, bounds[sequence]), min(stop, bounds[sequence + 1])
        if first >= stop:
            break
        pieces.append(Piece(sequence, first, last, first == bounds[sequence], last == bounds[sequence + 1]))
    return tuple(pieces)


def _check_ranges(tokens: int, ranges: Sequence[Sequence[Range]]) -> None:
    """Check that every token is in one range."""
    for rank, own in enumerate(ranges):
        for start, stop in own:
            if not 0 <= start <= stop <= tokens:
                raise ValueError(f"layout: rank {rank} has the tokens {start} to {stop}, and there are 0 to {tokens}")
    at = 0
    for start, stop, rank in sorted((start, stop, rank) for rank, own in enumerate(ranges) for start, stop in own):
        if start == stop:
            continue
        if start != at:
            fault = "no rank has" if start > at else f"rank {rank} has again"
            raise ValueError(f"layout: {fault} the tokens {min(at, start)} to {max(at, start)}")
        at = stop
    if at != tokens:
        raise ValueError(f"layout: no rank has the tokens {at} to {tokens}")
