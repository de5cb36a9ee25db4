"""How documents fill sequences of a context: one in each, packed whole, or as a stream that is cut at every border."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from powerplan.lengths.histogram import Lengths

Way = Literal["padded", "packed", "stream"]


@dataclass(frozen=True)
class Packing:
    """One way to put documents into sequences of a context.

    way: "padded", one document, or one piece of a long one, in each sequence; "packed", as many whole ones as fit;
    "stream", documents one after another, cut wherever a sequence ends.
    sequences: how many there are. tokens: of all documents. cut: documents that are not whole in one sequence; of a
    stream the expected number, where each place of a border is equally likely.
    """

    way: Way
    context: int
    sequences: int
    tokens: int
    cut: Fraction

    @property
    def padding(self) -> Fraction:
        """The share of the sequences' tokens that is padding."""
        return 1 - Fraction(self.tokens, self.sequences * self.context)


def packings(lengths: Lengths, context: int) -> tuple[Packing, Packing, Packing]:
    """Return what the three ways make of documents, those longer than the context cut into pieces first."""
    pieces, tokens = lengths.cut(context), lengths.tokens
    long = Fraction(lengths.longer_than(context))
    # A border falls between two tokens of a document at 1/context for each of its length - 1 gaps.
    cut = sum((Fraction(count * min(length - 1, context), context) for length, count in lengths.counts), Fraction(0))
    return (
        Packing("padded", context, pieces.documents, tokens, long),
        Packing("packed", context, packed_sequences(pieces, context), tokens, long),
        Packing("stream", context, -(-tokens // context), tokens, cut),
    )


@lru_cache(64)
def filled_share(pieces: Lengths, context: int) -> Fraction:
    """Return the share of the tokens of sequences that documents of at most `context` tokens fill, packed whole."""
    return Fraction(pieces.tokens, packed_sequences(pieces, context) * context)


def packed_sequences(pieces: Lengths, context: int) -> int:
    """Return into how many sequences Best-fit Packing puts documents of at most `context` tokens.

    The longest document comes first, and each goes into the fullest sequence that has room for it (best-fit decreasing:
    Ding et al. 2024, arXiv 2404.10830). Those of one length are placed together: a sequence
    that takes one of them has the least room for the next one too, until it has none, so that the count is exact.
    """
    rooms: dict[int, int] = {}
    order: list[int] = []
    sequences = 0

    def add(room: int, count: int) -> None:
        if room and count:
            if room not in rooms:
                insort(order, room)
                rooms[room] = 0
            rooms[room] += count

    for length, left in reversed(pieces.counts):
        while left:
            place = bisect_left(order, length)
            room = order[place] if place < len(order) else context
            each = room // length
            if place < len(order):
                found = rooms.pop(room)
                del order[place]
            else:
                found = -(-left // each)
                sequences += found
            whole = min(found, left // each)
            left -= whole * each
            add(room - each * length, whole)
            if whole < found:  # Fewer are left than the next sequence has room for.
                add(room - left * length, 1)
                add(room, found - whole - 1)
                left = 0
    return sequences
