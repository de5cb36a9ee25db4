"""Reverse questions: the context, the window or the degree that gives a weight-state FLOP ratio, by exact search."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from powerplan.accounting import Accounting, Row
from powerplan.choices import Unknown
from powerplan.errors import InfeasibleError, InputError, parameter
from powerplan.mixers import Convention
from powerplan.mixers.power import MAX_DEGREE
from powerplan.spec import ModelSpec
from powerplan.swap import Swap, swapped
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.windows import balanced_window, can_swap
from powerplan.units import MAX_CONTEXT, format_ratio


@dataclass(frozen=True)
class Solution:
    """The largest value of the unknown at which the weights are `target` times the state or more.

    swap: what it means for the model, None for a context.
    at, beyond: the numbers at this value and at the next one.
    """

    unknown: Unknown
    value: int
    swap: Swap | None
    at: Row
    beyond: Row


@dataclass(frozen=True)
class _Question:
    """A model, and under what its numbers are counted."""

    spec: ModelSpec
    context: int
    target: Fraction
    convention: Convention
    dtype: str

    def row(self, swap: Swap) -> Row:
        return Accounting(swapped(self.spec, swap)[0], self.convention).row(self.context, self.dtype)


def solve(
    spec: ModelSpec,
    unknown: Unknown,
    context: int,
    target: Fraction,
    convention: Convention,
    dtype: str = "bf16",
) -> Solution:
    """Return the largest context, window or degree that keeps the ratio at `target` or above.

    Args:
        spec: the model.
        unknown: what is looked for, in every layer.
        context: at how many tokens windows and degrees are judged.
        target: weight FLOPs over state FLOPs.
        convention: what is counted.
        dtype: of weights and cache, for the bytes of the rows.

    Raises:
        InfeasibleError: no value gives the ratio; the message says what it is at the end of the range.
        InputError: the question does not fit this model or form.
    """
    question = _Question(spec, context, target, convention, dtype)
    if unknown == "context":
        return _context(question)
    if not can_swap(spec):
        raise InputError(
            f"{spec.name} has mixers that no other can take the place of", f"{parameter('solve')} {unknown}"
        )
    return _window(question) if unknown == "window" else _degree(question)


def _context(question: _Question) -> Solution:
    accounting, target = Accounting(question.spec, question.convention), question.target
    if not accounting.grows_with_context:
        raise InputError(
            f"needs {parameter('form', 'recurrent')}: chunked, state FLOPs can fall as the context grows",
            f"{parameter('solve')} context",
        )
    value = accounting.balanced_context(target)
    if value is None:
        first, last = accounting.row(1), accounting.row(MAX_CONTEXT)
        if first.wsfr is not None and first.wsfr < target:
            raise InfeasibleError(_never("context", "a context of one token", first, target))
        raise InfeasibleError(_never("context", "a context of 2^50 tokens", last, target))
    at, beyond = (accounting.row(tokens, question.dtype) for tokens in (value, value + 1))
    return Solution("context", value, None, at, beyond)


def _window(question: _Question) -> Solution:
    context, target, heads = question.context, question.target, replacement_heads(question.spec)

    def row(window: int) -> Row:
        return question.row(Swap.attention(heads, window))

    value = balanced_window(question.spec, context, question.convention, target)
    if value is None:
        first = row(1)
        if first.wsfr is not None and first.wsfr < target:
            raise InfeasibleError(_never("window", "a window of one token", first, target))
        raise InfeasibleError(_never("window", f"a window of the whole {context:,} tokens", row(context), target))
    return Solution("window", value, Swap.attention(heads, value), row(value), row(value + 1))


def _degree(question: _Question) -> Solution:
    target, heads = question.target, replacement_heads(question.spec)
    rows: list[Row] = []
    for p in range(1, MAX_DEGREE + 1):
        rows.append(question.row(Swap.power(p, heads)))
        ratio = rows[-1].wsfr
        assert ratio is not None
        if ratio < target:
            break
    else:
        raise InfeasibleError(_never("degree", f"p = {MAX_DEGREE}", rows[-1], target))
    value = len(rows) - 1
    if not value:
        raise InfeasibleError(_never("degree", "p = 1", rows[0], target))
    return Solution("p", value, Swap.power(value, heads), rows[-2], rows[-1])


def _never(unknown: str, end: str, row: Row, target: Fraction) -> str:
    """Return a sentence: no value is right, and what the ratio is at the end of the range that comes nearest."""
    if row.wsfr is None:
        return f"no {unknown} gives {format_ratio(target)}: the model has no state"
    relative = row.wsfr / target
    side = "light" if relative > 1 else "heavy"
    times = f"{float(max(relative, 1 / relative)):,.3g}"
    return (
        f"no {unknown} gives {format_ratio(target)}: {end} leaves the state {times} times too {side}, "
        f"{format_ratio(row.wsfr)}"
    )
