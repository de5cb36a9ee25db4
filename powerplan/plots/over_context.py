"""What models are over the context: their ratios and their state, as lines and as a figure of both."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from powerplan.accounting import Accounting, Row
from powerplan.curves import sampled_contexts
from powerplan.dtypes import Dtypes
from powerplan.plots.figure import legend_below, panels, titled
from powerplan.plots.lines import (
    AS_IT_IS,
    Box,
    Series,
    alike_remarks,
    bytes_axis,
    context_axis,
    draw,
    handles,
    level,
    look,
    ratio_axis,
    upright,
)
from powerplan.units import format_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 4
"""Points of a line from one power of two to the next: a full window is a bend in it."""

MOST_NAMED = 8
"""Most contexts that are named beside their lines; the axis names more of them well enough."""


def rows_over_context(accounting: Accounting, contexts: Sequence[int], dtypes: Dtypes) -> list[Row]:
    """Return the numbers of a model at each context."""
    return [accounting.row(context, dtypes) for context in contexts]


def ratio_series(rows: Sequence[Row], marked: Sequence[int]) -> Series:
    """Return the line of a model's weight-state FLOP ratio; no points for a model without state."""
    points = ((float(row.context), float(row.wsfr)) for row in rows if row.wsfr is not None)
    return Series(tuple(points), frozenset(marked))


def state_series(rows: Sequence[Row], marked: Sequence[int]) -> Series:
    """Return the line of a model's state per sequence, in bytes; no points for a model without state."""
    points = ((float(row.context), float(row.state_bytes)) for row in rows if row.state_bytes)
    return Series(tuple(points), frozenset(marked))


def ratio_and_state(
    accountings: Sequence[Accounting],
    contexts: Sequence[int],
    dtypes: Dtypes,
    *,
    names: Sequence[str],
    labels: Sequence[str],
    title: str,
    below: str,
    unchanged: int | None = None,
    target: Fraction = Fraction(1),
) -> Figure:
    """Return a figure of models over the context: above their weight-state FLOP ratios, below their state per sequence.

    contexts: those that were asked for, marked on every line. names: of the models, as the legend refers to them.
    labels: of the models in the legend. unchanged: the place of the model as it is, where the others are made of it.
    target: the ratio whose level is drawn.
    """
    figure, grid = panels([3.7, 2.6], share_x=True)
    (upper,), (lower,) = grid
    sampled = sampled_contexts(contexts, STEPS)
    rows = [rows_over_context(accounting, sampled, dtypes) for accounting in accountings]
    ratios, states = [ratio_series(own, contexts) for own in rows], [state_series(own, contexts) for own in rows]
    looks = [look(place) for place in range(len(rows))]
    if unchanged is not None:
        looks = [*looks[:unchanged], AS_IT_IS, *looks[unchanged:-1]]
    draw(upper, ratios, looks)
    draw(lower, states, looks)
    context_axis(lower, sampled)
    upper.margins(y=0.08)
    ratio_axis(upper)
    bytes_axis(lower, "state per sequence")
    level(upper, float(target), target_text(target), ratios)
    taken: list[Box] = []
    for context in contexts:
        upright(upper, context, f"{context:,}" if len(contexts) <= MOST_NAMED else "", ratios, taken=taken)
        upright(lower, context)
    titled(figure, title, below)
    remarks = alike_remarks(names, ratios, states)
    legend_below(figure, handles(looks), [f"{label}{remark}" for label, remark in zip(labels, remarks, strict=True)])
    return figure


def target_text(target: Fraction) -> str:
    """Return the name of the level of a ratio."""
    return "1:1, as many weight as state FLOPs" if target == 1 else f"target {format_ratio(target)}"
