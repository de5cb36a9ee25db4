"""Bisection over times that are known in advance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.profile.crossover import CLOSE_ENOUGH, LONGEST, SHORTEST, Pair, find_crossover
from powerplan.profile.result import Crossover
from powerplan.report.profile import crossover_text


def linear_against_square(crossing: float) -> Callable[[int], Pair]:
    return lambda context: (context * crossing * 1e-9, context**2 * 1e-9)


def crossover_of(known: list[int], at: Callable[[int], Pair | None]) -> Crossover:
    pairs = {context: pair for context in known if (pair := at(context)) is not None}
    crossover = find_crossover(pairs, at, name="power", against="softmax", direction="forward")
    assert crossover is not None
    return crossover


@given(st.floats(200, 2e6), st.lists(st.integers(64, 65536), min_size=1, max_size=4, unique=True))
def test_it_is_found_wherever_one_starts(crossing: float, known: list[int]) -> None:
    answer = crossover_of(known, linear_against_square(crossing))
    assert answer.slower_at is not None
    assert answer.faster_at is not None
    assert answer.slower_at < crossing <= answer.faster_at
    assert answer.faster_at / answer.slower_at <= max(CLOSE_ENOUGH, 1 + 32 / answer.slower_at)
    assert answer.context == pytest.approx(crossing, rel=0.01)
    assert len(answer.tried) <= len(known) + 12


def test_faster_from_the_beginning() -> None:
    answer = crossover_of([1024], lambda context: (1.0, 2.0))
    assert (answer.context, answer.slower_at, answer.faster_at) == (None, None, SHORTEST)


def test_never_faster() -> None:
    answer = crossover_of([1024], lambda context: (2.0, 1.0))
    assert answer.context is None
    assert answer.faster_at is None
    assert answer.slower_at == LONGEST


def test_what_cannot_be_measured_ends_the_search_with_an_estimate() -> None:
    times = linear_against_square(40_000)
    answer = crossover_of([1024, 4096], lambda context: times(context) if context <= 10_000 else None)
    assert (answer.context, answer.slower_at, answer.faster_at) == (None, 4096, None)
    assert answer.estimate == pytest.approx(40_000, rel=0.01)


def test_no_estimate_is_printed_from_one_context() -> None:
    times = linear_against_square(40_000)

    def said_of(*known: int) -> str:
        return crossover_text(crossover_of([*known], lambda context: times(context) if context in known else None))

    said = [said_of(256), said_of(256, 1024)]
    assert said[0].endswith("does not overtake softmax up to 256 tokens, where time or memory ended the search")
    assert "it would be at about" not in said[0]
    assert said[1].endswith("ended the search; it would be at about 40,000")


def test_nothing_known() -> None:
    assert find_crossover({}, lambda context: None, name="a", against="b", direction="forward") is None
