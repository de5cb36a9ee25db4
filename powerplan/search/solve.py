"""Reverse questions: the context, the window or the degree that gives a weight-state FLOP ratio, by exact search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from powerplan.accounting import Accounting, Row
from powerplan.choices import Unknown
from powerplan.dtypes import Dtypes
from powerplan.errors import InfeasibleError, InputError, parameter
from powerplan.mixers import Convention
from powerplan.mixers.power import MAX_DEGREE
from powerplan.spec import ModelSpec
from powerplan.swap import Swap, swapped
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.windows import balanced_window, check_swappable
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


def solve(
    spec: ModelSpec,
    unknown: Unknown,
    context: int,
    target: Fraction,
    convention: Convention,
    dtypes: Dtypes | str = "bf16",
) -> Solution:
    """Return the largest context, window or degree, in every layer, that keeps the ratio at `target` or above.

    Windows and degrees are judged at `context` tokens. `dtypes` count in the bytes of the rows.

    Raises:
        InfeasibleError: no value gives the ratio; the message says what it is at the end of the range.
        InputError: the question does not fit this model or form.
    """
    accounting, heads = Accounting(spec, convention), replacement_heads(spec)
    check_swappable(spec, unknown)

    def row(value: int) -> Row:
        swap = Swap.solving(unknown, value, heads)
        if swap is None:
            return accounting.row(value, dtypes)
        return Accounting(swapped(spec, swap)[0], convention).row(context, dtypes)

    def light(value: int) -> bool:
        ratio = row(value).wsfr
        return ratio is None or ratio >= target

    if unknown == "context":
        if not accounting.longest_is_found:
            raise InputError(_not_computed(accounting), parameter("unknown", unknown))
        value, last = accounting.balanced_context(target), MAX_CONTEXT
        at_first, at_last = "a context of one token", "a context of 2^50 tokens"
    elif unknown == "window":
        value, last = balanced_window(spec, context, convention, target), context
        at_first, at_last = "a window of one token", f"a window of the whole {context:,} tokens"
    else:
        value, last = next((p - 1 for p in range(1, MAX_DEGREE + 1) if not light(p)), None), MAX_DEGREE
        at_first, at_last = "p = 1", f"p = {MAX_DEGREE}"
    if not value:
        end, place = (last, at_last) if light(1) else (1, at_first)
        raise InfeasibleError(_never("degree" if unknown == "p" else unknown, place, row(end), target))
    return Solution(unknown, value, Swap.solving(unknown, value, heads), row(value), row(value + 1))


def _not_computed(accounting: Accounting) -> str:
    """Return a sentence: why no context is found for a model and a form."""
    recurrent = Accounting(accounting.spec, replace(accounting.convention, form="recurrent"))
    if recurrent.longest_is_found:
        return f"needs {parameter('form', 'recurrent')}: chunked, state FLOPs can fall as the context grows"
    return f"{accounting.spec.name} has mixers whose state FLOPs per token can fall as the context grows"


def _never(unknown: str, end: str, row: Row, target: Fraction) -> str:
    """Return a sentence: no value is right, and what the ratio is at the end of the range that comes nearest."""
    if row.wsfr is None:
        return f"no {unknown} gives {format_ratio(target)}: the model has no state"
    relative = row.wsfr / target
    side = "light" if relative > 1 else "heavy"
    leaves = f"leaves the state {float(max(relative, 1 / relative)):,.3g} times too {side}"
    return f"no {unknown} gives {format_ratio(target)}: {end} {leaves}, {format_ratio(row.wsfr)}"
