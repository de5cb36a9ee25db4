"""Superlinear attention: a query scores anchors at squared distances, and attends to spans around the best of them."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import isqrt
from typing import Annotated

import msgspec

from powerplan.mixers.formulas import Convention, Formulas, Rational, mean_keys
from powerplan.mixers.heads import GroupedHeads

MOST_ANCHORS = 1024
"""The most anchors that a window may stand for: a window of a million tokens, whose sums take 10 ms."""


class SpanSearch(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="span_search"):
    """Superlinear attention in two steps: search spans with queries of their own, attend to the tokens of the best.

    Query number n, from 1, has an anchor i^2 - 1 tokens back for each i from window_anchors + 1 to the root of n. Each
    query head picks `spans` anchors. A span reaches `backward` roots of n back from its anchor and `forward` roots on,
    each rounded up; it ends before the window, the last (window_anchors + 1)^2 - 1 tokens.
    parameters in matmuls: attention's, and mHk of the search queries; they meet the keys of attention
    state: G(k + v)t
    state FLOPs per token: 2Hk anchors to search, 2H(k + v)(picked + near) to attend. Both grow with the root of t.
    Spans count whole, up to all tokens before the window; the weighted sum of the spans is not counted. Heads that
    share keys pick spans of their own: a decoded token reads up to H/G times the tokens of its spans.
    This is the published N = 2. For N > 2 the paper has the order L^(1 + 1/N) alone, and for the exponent 0.54 of its
    measurements no closed sums exist; both are left out.

    spans: spans that a query head picks.
    backward: how far a span reaches back from its anchor, in roots of n.
    forward: how far it reaches on, in roots of n.
    window_anchors: anchors that the window takes the place of.
    """

    source = "Huang 2026, arXiv 2601.18401 (N = 2); superlinear 0.1.0, kernels/superlinear/search/_reference.py"
    entry = "G*(k + v)"
    state = "G*(k + v)*t"
    looked_up = "G*k*anchors + G*(k + v)*(picked + near)"
    sparse_reads = True

    spans: Annotated[int, msgspec.Meta(ge=1, le=64)] = 3
    backward: Annotated[int, msgspec.Meta(ge=1, le=16)] = 3
    forward: Annotated[int, msgspec.Meta(ge=0, le=16)] = 1
    window_anchors: Annotated[int, msgspec.Meta(ge=0, le=MOST_ANCHORS)] = 44

    @property
    def window_tokens(self) -> int:
        return (self.window_anchors + 1) ** 2 - 1

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("search queries", "m*H*k"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("search queries", "1", "H*k", "m"))

    def flops_formulas(self, chunked: bool) -> Formulas:
        return (
            ("span search: anchors", "2*H*k*anchors"),
            ("span search: spans", "2*H*(k + v)*picked"),
            ("span search: window", "2*H*(k + v)*near"),
        )

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        near = mean_keys(context, convention.causal, self.window_tokens) if self.window_tokens else Fraction(0)
        if convention.causal == "full":
            anchors, picked = self.anchors_at(context), self.picked_at(context)
            return {"anchors": anchors, "picked": picked, "near": near}
        anchors, picked = self._anchors_up_to(context), self._picked_up_to(context)
        return {"anchors": Fraction(anchors, context), "picked": Fraction(picked, context), "near": near}

    def state_values(self, context: int) -> dict[str, int]:
        """Return what the last token reads: `picked` are the tokens in the spans of all heads that share keys."""
        values = super().state_values(context)
        before = max(0, context - self.window_tokens)
        return values | {"picked": min(before, self.heads // self.kv_heads * values["picked"])}

    def anchors_at(self, position: int) -> int:
        """Return the anchors of query number `position`, from 1."""
        return max(0, isqrt(position) - self.window_anchors)

    def picked_at(self, position: int) -> int:
        """Return the tokens of the spans that one head of query number `position`, from 1, attends to."""
        length = span_length(position, self.window_tokens, self.backward, self.forward)
        return min(self.spans, self.anchors_at(position)) * length

    def _anchors_up_to(self, context: int) -> int:
        """Return the anchors of all queries: anchor i exists for the t - i^2 + 1 queries from number i^2 on."""
        first, last = self.window_anchors + 1, isqrt(context)
        if last < first:
            return 0
        return (last - first + 1) * (context + 1) - (sum_of_squares(last) - sum_of_squares(first - 1))

    def _picked_up_to(self, context: int) -> int:
        """Return the tokens in the spans of all queries; the j-th span exists from the j-th anchor on."""
        every = self._spans_up_to(context)
        starts = ((self.window_anchors + number) ** 2 for number in range(1, self.spans + 1))
        return sum(every - self._spans_up_to(start - 1) for start in starts if start <= context)

    def _spans_up_to(self, context: int) -> int:
        """Return the summed length of one span for each query after the window."""
        clipped = clipped_sums(self.window_tokens, self.backward, self.forward)
        free = self.window_tokens + len(clipped) - 1
        if context <= free:
            return clipped[max(0, context - self.window_tokens)]
        factors = (self.backward, self.forward)
        roots = sum(sum_of_ceil_roots(factor, context) - sum_of_ceil_roots(factor, free) for factor in factors)
        return clipped[-1] + roots + context - free

    def describe(self) -> str:
        return f"span search, {self.spans} spans"


def span_length(position: int, window: int, backward: int, forward: int) -> int:
    """Return the tokens of a span of query number `position`, from 1: at most those before the window."""
    return min(1 + ceil_root(backward, position) + ceil_root(forward, position), position - window)


@lru_cache(maxsize=256)
def clipped_sums(window: int, backward: int, forward: int) -> tuple[int, ...]:
    """Return the summed lengths of one span for the first 0, 1, 2 ... queries after the window, while it may clip them.

    A span has at most (backward + forward)(root + 1) + 3 tokens, with the root of n rounded down. Once no more than
    that are before the window, spans are whole: the root grows slower than n from there on.
    """
    factor, root = backward + forward, isqrt(window + 1)
    while root**2 - window < factor * (root + 1) + 3:
        root += 1
    lengths = (span_length(position, window, backward, forward) for position in range(window + 1, root**2))
    return tuple(accumulate(lengths, initial=0))


def sum_of_squares(count: int) -> int:
    """Return 1 + 4 + ... + count^2."""
    return count * (count + 1) * (2 * count + 1) // 6


def ceil_root(factor: int, number: int) -> int:
    """Return factor times the square root of `number`, rounded up."""
    squared = factor**2 * number
    return isqrt(squared - 1) + 1 if squared else 0


@lru_cache(maxsize=1024)
def sum_of_ceil_roots(factor: int, count: int) -> int:
    """Return the sum of `ceil_root(factor, n)` for n from 1 to `count`.

    The value of n is above v where n is above v^2 / factor^2: for count - floor(v^2 / factor^2) numbers. The remainders
    of v^2 repeat after factor^2 values of v, so that the sum of the floors is closed.
    """
    values = ceil_root(factor, count)
    if not values:
        return 0
    square = factor**2
    remainders = [value**2 % square for value in range(square)]
    periods, rest = divmod(values, square)
    floors = (sum_of_squares(values - 1) - periods * sum(remainders) - sum(remainders[:rest])) // square
    return values * count - floors
