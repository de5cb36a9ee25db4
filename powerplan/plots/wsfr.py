"""The figures of `powerplan wsfr`: the ratio over the context, and what the FLOPs are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count
from typing import TYPE_CHECKING, Any

from powerplan.accounting import Accounting, Component, Row, positions_text
from powerplan.choices import By
from powerplan.curves import sampled_contexts
from powerplan.dtypes import Dtypes
from powerplan.plots.figure import convention_text, legend_below, name_of, panels, styled, titled
from powerplan.plots.lines import (
    AS_IT_IS,
    BLACK,
    BOX,
    COLOURS,
    STATE,
    WEIGHTS,
    Look,
    Series,
    context_axis,
    draw,
    handles,
    level,
    log_axis,
    ratio_axis,
    share_axis,
    upright,
    value_label,
)
from powerplan.plots.over_context import STEPS, ratio_series, rows_over_context, target_text
from powerplan.report.parts import parameters_text, show_flops, show_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_VALUES = 12
"""Most contexts whose ratios are written beside their markers."""

_LOOKS = (Look(WEIGHTS, "-", "s"), Look(STATE, (0, (6, 2)), "o"))


@styled
def wsfr_figure(accounting: Accounting, rows: Sequence[Row], by: By | None = None) -> Figure:
    """Return a figure of a model's weight-state FLOP ratio over the context, and of its two sides below.

    rows: the numbers at the contexts that were asked for, marked with their ratios. by: "component" or "layer" for the
    shares of these in the FLOPs of each context, as bars, in place of that.

    Raises:
        MachineError: matplotlib is not installed.
    """
    name = name_of(accounting.spec)
    below = f"{parameters_text(accounting)}; {convention_text(accounting.convention)}"
    if by is not None:
        figure = _shares(accounting, rows, by)
        titled(figure, f"{name}: FLOPs per token by {by}", below)
        return figure
    figure, grid = panels([3.4, 2.7], share_x=True)
    (upper,), (lower,) = grid
    contexts = [row.context for row in rows]
    balanced, sampled = accounting.balanced_context(), sampled_contexts(contexts, STEPS)
    inside = balanced is not None and sampled[0] <= balanced <= sampled[-1]
    if balanced is not None and inside:
        sampled = sorted({*sampled, balanced})
    over = rows_over_context(accounting, sampled, Dtypes())
    ratios = [ratio_series(over, contexts)]
    draw(upper, ratios, [AS_IT_IS])
    sides = _sides(over, contexts)
    draw(lower, sides, _LOOKS)
    context_axis(lower, sampled)
    upper.margins(y=0.12)
    lower.margins(y=0.12)
    ratio_axis(upper)
    log_axis(lower, show_flops, "FLOPs per token")
    for row in rows if len(rows) <= MOST_VALUES else ():
        if row.wsfr is not None:
            value_label(upper, row.context, float(row.wsfr), show_ratio(row.wsfr))
    if any(row.wsfr is not None for row in rows):
        level(upper, 1.0, target_text(Fraction(1)), ratios)
    else:
        _say(upper, "no state: every FLOP is between activations and weights")
    positions = accounting.spec.position_embeddings
    if positions is not None and sampled[0] <= positions <= sampled[-1]:
        upright(upper, positions)
        upright(lower, positions, f"learned positions end at {positions:,}", sides)
    if balanced is not None and inside:
        upright(upper, balanced, f"balanced at {balanced:,}", ratios, strong=True)
        upright(lower, balanced, strong=True)
    elif balanced is not None:
        below += f"; balanced at {balanced:,}"
    titled(figure, f"{name}: weight-state FLOP ratio over the context", below)
    legend_below(figure, handles(_LOOKS), ["weight FLOPs", "state FLOPs"])
    return figure


def _sides(rows: Sequence[Row], marked: Sequence[int]) -> tuple[Series, Series]:
    """Return the lines of weight and of state FLOPs per token."""
    weights = tuple((float(row.context), float(row.weight_flops_per_token)) for row in rows)
    state = tuple((float(row.context), float(row.state_flops_per_token)) for row in rows if row.state_flops_per_token)
    return Series(weights, frozenset(marked)), Series(state, frozenset(marked))


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.25")


def _shares(accounting: Accounting, rows: Sequence[Row], by: By) -> Figure:
    """Return a bar for each context: the shares of the parts in its FLOPs, weights first and state, hatched, last."""
    from matplotlib.patches import Patch

    parts = [
        accounting.components(row.context) if by == "component" else accounting.layers(row.context) for row in rows
    ]
    colours = _part_colours(parts)
    figure, ((axes,),) = panels([0.95 + 0.5 * len(rows)])
    places, start = list(range(len(rows))), [0.0] * len(rows)
    sides: dict[str, list[str]] = {name: [] for name in colours}
    for side in ("weight", "state"):
        for name, colour in colours.items():
            shares = [_share(own, name, side, row) for own, row in zip(parts, rows, strict=True)]
            if not any(shares):
                continue
            sides[name].append(side)
            axes.barh(places, shares, left=start, height=0.7, facecolor=colour, **_FILLS[side])
            for place, share, left in zip(places, shares, start, strict=True):
                if share >= 0.06:
                    _inside(axes, left + share / 2, place, f"{share:.1%}")
            start = [left + share for left, share in zip(start, shares, strict=True)]
    above: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8.5}
    axes.annotate("1:1", (0.5, 1), xytext=(0, 2), xycoords=("data", "axes fraction"), **above)
    names = [f"{row.context:,} tokens\n{show_ratio(row.wsfr)}" for row in rows]
    share_axis(axes, names, "share of the FLOPs per token")
    legend = [(Patch(facecolor=colours[name], **_FILLS[own[0]]), name) for name, own in sides.items() if own]
    legend.append((Patch(facecolor="0.6", **_FILLS["state"]), "hatched: state FLOPs; the rest: weight FLOPs"))
    legend_below(figure, [patch for patch, _ in legend], [label for _, label in legend])
    return figure


_FILLS: dict[str, dict[str, Any]] = {
    "weight": {"edgecolor": "white", "linewidth": 0.8},
    "state": {"edgecolor": "white", "linewidth": 0.8, "hatch": "////"},
}


def _part_colours(parts: Sequence[Sequence[Component]]) -> dict[str, str]:
    """Return a colour for each part by its name: one of state for what is state alone. The largest parts choose first.

    parts: those of each row.
    """
    flops: dict[str, list[float]] = {}
    for own in parts:
        whole = float(sum(part.weight_flops_per_token + part.state_flops_per_token for part in own))
        for part in own:
            share = float(part.weight_flops_per_token + part.state_flops_per_token) / whole
            flops.setdefault(_name(part), []).append(share)
    with_weights = {_name(part) for own in parts for part in own if part.weight_flops_per_token}
    weights = _tints([WEIGHTS, *(colour for colour in COLOURS if colour not in (WEIGHTS, STATE)), "#999999"])
    state = _tints([STATE, BLACK])
    colours = {
        name: next(weights if name in with_weights else state)
        for name in sorted(flops, key=lambda name: max(flops[name]), reverse=True)
    }
    return {name: colours[name] for name in flops}


def _tints(colours: Sequence[str]) -> Iterator[str]:
    """Yield colours again and again, lighter each time."""
    for turn in count():
        for colour in colours:
            light = 1 - 0.55**turn
            channels = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
            yield "#" + "".join(f"{round(value + (255 - value) * light):02x}" for value in channels)


def _name(part: Component) -> str:
    return part.name if part.use is None else f"{part.name} in {positions_text(part.use.positions)}"


def _share(parts: Sequence[Component], name: str, side: str, row: Row) -> float:
    """Return the share of one side of a part in the FLOPs of a row."""
    flops = sum(getattr(part, f"{side}_flops_per_token") for part in parts if _name(part) == name)
    return float(flops / row.flops_per_token)


def _inside(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color="0.05", bbox=BOX)
