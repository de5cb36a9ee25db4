"""Reverse questions: the context, the window or the degree that gives a weight-state FLOP ratio, by exact search."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from powerplan.accounting import Accounting, Row
from powerplan.errors import InfeasibleError, InputError
from powerplan.mixers import Convention
from powerplan.mixers.power import MAX_DEGREE
from powerplan.spec import ModelSpec
from powerplan.swaps import balanced_window, can_swap, default_shape, power_text, window_text
from powerplan.units import MAX_CONTEXT, format_ratio
from powerplan.whatif import with_mixer

Unknown = Literal["context", "window", "p"]


@dataclass(frozen=True)
class Solution:
    """The largest value of the unknown at which the weights are `target` times the state or more.

    mixer: the `--mixer` text that it means, None for a context. at and beyond: the numbers there and at one more.
    """

    unknown: Unknown
    value: int
    mixer: str | None
    at: Row
    beyond: Row


def solve(
    spec: ModelSpec,
    unknown: Unknown,
    context: int,
    target: Fraction,
    convention: Convention,
    dtype: str = "bf16",
) -> Solution:
    """Return the largest context, window or degree that keeps the ratio at `target` or above.

    `context` is what windows and degrees are judged at, `dtype` that of the cache. Raises InfeasibleError where there
    is none, with what the ratio is at the end of the range; InputError for a model or a form that the question does
    not fit.
    """
    if unknown == "context":
        return _context(spec, target, convention, dtype)
    if not can_swap(spec):
        raise InputError(f"{spec.name} has mixers that no other can take the place of", f"--solve {unknown}")
    return (
        _window(spec, context, target, convention, dtype)
        if unknown == "window"
        else _degree(spec, context, target, convention, dtype)
    )


def _context(spec: ModelSpec, target: Fraction, convention: Convention, dtype: str) -> Solution:
    accounting = Accounting(spec, convention)
    if not accounting.grows_with_context:
        raise InputError(
            "needs --form recurrent: chunked, state FLOPs can fall as the context grows", "--solve context"
        )
    value = accounting.balanced_context(target)
    if value is None:
        first, last = accounting.row(1), accounting.row(MAX_CONTEXT)
        if first.wsfr is not None and first.wsfr < target:
            raise InfeasibleError(_never("context", "a context of one token", first, target))
        raise InfeasibleError(_never("context", "a context of 2^50 tokens", last, target))
    return Solution("context", value, None, accounting.row(value, dtype), accounting.row(value + 1, dtype))


def _window(spec: ModelSpec, context: int, target: Fraction, convention: Convention, dtype: str) -> Solution:
    shape = default_shape(spec)

    def row(window: int) -> Row:
        return Accounting(with_mixer(spec, window_text(window, shape))[0], convention).row(context, dtype)

    value = balanced_window(spec, context, convention, target)
    if value is None:
        first = row(1)
        if first.wsfr is not None and first.wsfr < target:
            raise InfeasibleError(_never("window", "a window of one token", first, target))
        raise InfeasibleError(_never("window", f"a window of the whole {context:,} tokens", row(context), target))
    return Solution("window", value, window_text(value, shape), row(value), row(value + 1))


def _degree(spec: ModelSpec, context: int, target: Fraction, convention: Convention, dtype: str) -> Solution:
    shape = default_shape(spec)
    rows = []
    for p in range(1, MAX_DEGREE + 1):
        rows.append(Accounting(with_mixer(spec, power_text(p, shape))[0], convention).row(context, dtype))
        ratio = rows[-1].wsfr
        assert ratio is not None
        if ratio < target:
            break
    else:
        raise InfeasibleError(_never("degree", f"p = {MAX_DEGREE}", rows[-1], target))
    value = len(rows) - 1
    if not value:
        raise InfeasibleError(_never("degree", "p = 1", rows[0], target))
    return Solution("p", value, power_text(value, shape), rows[-2], rows[-1])


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
