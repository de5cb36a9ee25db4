"""Layouts of tokens over ranks, and the messages of a scan over their fragments, for more ranks than processes run."""

from __future__ import annotations

from itertools import pairwise
from math import ceil, log2
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.kernels.distributed.exchange import Wire
from powerplan.kernels.distributed.layout import Layout, make_layout, named_ranges


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Return sequences of any lengths over ranks that have any ranges, in any order."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    ranks = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["contiguous", "zigzag", "cut"]))
    if kind != "cut":
        return make_layout(bounds, named_ranges(kind, bounds[-1], ranks))
    cuts = sorted(draw(st.sets(st.integers(1, bounds[-1]), max_size=30)) | {0, bounds[-1]})
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for start, stop in draw(st.permutations(list(pairwise(cuts)))):
        ranges[draw(st.integers(0, ranks - 1))].append((start, stop))
    return make_layout(bounds, ranges)


def sequence_of(layout: Layout, token: int) -> int:
    return next(index for index, stop in enumerate(layout.bounds[1:]) if token < stop)


@given(layouts())
def test_fragments_hold_every_token_once_and_pieces_one_sequence_each(layout: Layout) -> None:
    found = sorted(
        (piece.start, piece.stop, piece.sequence) for fragment in layout.fragments for piece in fragment.pieces
    )
    tokens = [(token, sequence) for start, stop, sequence in found for token in range(start, stop)]
    assert tokens == [(token, sequence_of(layout, token)) for token in range(layout.tokens)]
    for rank, ranges in enumerate(layout.ranges):
        ids = [token for start, stop in ranges for token in range(start, stop)]
        for index in layout.of_rank(rank):
            fragment = layout.fragments[index]
            for piece in fragment.pieces:
                assert ids[fragment.local(piece)] == list(range(piece.start, piece.stop))


@given(layouts())
def test_a_fragment_counts_those_that_its_sequences_have_before_and_after_it(layout: Layout) -> None:
    for index, fragment in enumerate(layout.fragments):
        first, last = (sequence_of(layout, token) for token in (fragment.start, fragment.stop - 1))
        before = [one for one in layout.fragments[:index] if first in [piece.sequence for piece in one.pieces]]
        after = [one for one in layout.fragments[index + 1 :] if last in [piece.sequence for piece in one.pieces]]
        assert (fragment.before, fragment.after) == (len(before), len(after))


def wire(layout: Layout, rank: int = 0, way: str = "scan") -> Wire:
    nobody: Any = None
    return Wire(nobody, rank, layout, way, None)


@given(layouts(), st.booleans())
def test_a_scan_brings_each_fragment_all_before_it_in_order(layout: Layout, reverse: bool) -> None:
    step = -1 if reverse else 1
    rounds = wire(layout).rounds(reverse)
    sums: dict[int, list[int]] = {}
    for number, pairs in enumerate(rounds):
        sent = {target: sums[source] if number else [source] for source, target in pairs}
        for target, older in sent.items():
            sums[target] = older + sums.get(target, [])
    for index in range(len(layout.fragments)):
        distance = layout.distance(index, reverse)
        assert sums.get(index, []) == [index - step * far for far in range(distance, 0, -1)]
    if layout.longest:
        assert len(rounds) == 1 + ceil(log2(layout.longest))


@given(layouts(), st.booleans())
def test_every_message_is_counted_by_the_rank_that_sends_it(layout: Layout, reverse: bool) -> None:
    owners = [fragment.rank for fragment in layout.fragments]
    pairs = [pair for pairs in wire(layout).rounds(reverse) for pair in pairs] if layout.longest else []
    sent = [wire(layout, rank).messages(reverse) for rank in range(layout.ranks)]
    assert sum(sent) == sum(owners[source] != owners[target] for source, target in pairs)


@pytest.mark.parametrize(("ranks", "messages"), [(2, 1), (3, 2), (8, 4), (64, 7), (256, 9)])
def test_the_rank_that_sends_most_sends_as_many_states_as_there_are_rounds(ranks: int, messages: int) -> None:
    layout = make_layout((0, 4 * ranks), named_ranges("contiguous", 4 * ranks, ranks))
    most = max(wire(layout, rank).messages(False) for rank in range(ranks))
    assert most == messages == len(wire(layout).rounds(False))
    assert wire(layout, way="gather").messages(False) == 1


def test_nothing_is_sent_where_no_sequence_crosses_ranks() -> None:
    layout = make_layout((0, 3, 6), [[(0, 3)], [(3, 6)]])
    assert [wire(layout, way=way).messages(reverse) for way in ("gather", "scan") for reverse in (False, True)] == [
        0
    ] * 4


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("contiguous", (((0, 3),), ((3, 6),), ((6, 8),))),
        ("zigzag", (((0, 2), (7, 8)), ((2, 4), (6, 7)), ((4, 5), (5, 6)))),
    ],
)
def test_named_layouts(layout: str, expected: object) -> None:
    assert named_ranges(layout, 8, 3) == expected
