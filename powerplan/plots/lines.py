"""Lines of a figure, none of which hides another, and the axes, marks and labels around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import log10
from typing import TYPE_CHECKING, Any

from powerplan.curves import short_context
from powerplan.units import format_bytes, format_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.lines import Line2D

WEIGHTS, STATE = "#0072B2", "#D55E00"
"""The colours of weights and of state, where a figure has both."""

BLACK = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito (2008), which people with any colour vision tell apart; without the yellow, too light on white, and
the black, which is for a model as it is."""

_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">", "h", "d")

_WIDER, _BAND = 2.2, 5.0
"""By how many points a line is wider than the next one that lies on it, and the first than the last, at most."""

ALIKE = 0.01
"""Lines nearer to each other than this share of the panel's height, everywhere, lie on each other."""


@dataclass(frozen=True)
class Look:
    """The colour, dashes and marker of a line, and its width in points."""

    colour: str
    dashes: Any
    marker: str
    width: float = 1.7


AS_IT_IS = Look(BLACK, "-", "o", 3.4)
"""The look of a model as it is, among others that it could be."""


def look(place: int) -> Look:
    """Return the look of the line at `place` (from 0). The first 30 differ in more than the marker."""
    width = Look.width if place else 2.4  # A solid line later is above it, and narrower.
    return Look(COLOURS[place % len(COLOURS)], _DASHES[place % len(_DASHES)], _MARKERS[place % len(_MARKERS)], width)


@dataclass(frozen=True)
class Series:
    """The points of a line, in the order of x. marked: the x that the question asked for."""

    points: tuple[tuple[float, float], ...]
    marked: frozenset[float] = frozenset()

    @property
    def x(self) -> list[float]:
        return [x for x, _ in self.points]

    @property
    def y(self) -> list[float]:
        return [y for _, y in self.points]


def first_alike(series: Sequence[Series]) -> list[int]:
    """Return for each line the place of the first one that it lies on: its own where it lies on none before it."""
    heights = [[log10(y) for y in own.y] for own in series]
    every = [height for own in heights for height in own]
    near = ALIKE * (max(every) - min(every)) + 1e-9 if every else 0
    places: list[int] = []
    for place, (own, height) in enumerate(zip(series, heights, strict=True)):
        on = (
            first
            for first in dict.fromkeys(places)
            if own.points
            and series[first].x == own.x
            and all(abs(a - b) <= near for a, b in zip(height, heights[first], strict=True))
        )
        places.append(next(on, place))
    return places


def draw(axes: Axes, series: Sequence[Series], looks: Sequence[Look]) -> list[Line2D]:
    """Draw lines and return them, in order; none hides another.

    Dashed lines are above solid ones, and a model as it is, which is wider, is behind all. Of lines that lie on each
    other everywhere, those behind are wider.
    """
    alike = first_alike(series)
    order = sorted(range(len(series)), key=lambda place: (looks[place] != AS_IT_IS, looks[place].dashes != "-", place))
    lines = []
    for place, (own, style) in enumerate(zip(series, looks, strict=True)):
        rank = order.index(place)
        group = alike.count(alike[place])
        above = sum(alike[other] == alike[place] for other in order[rank + 1 :])
        wider = min(_WIDER, _BAND / max(1, group - 1)) * above
        (line,) = axes.plot(
            own.x,
            own.y,
            color=style.colour,
            linestyle="-" if above else style.dashes,
            linewidth=style.width + wider,
            alpha=0.55 if above else 1,
            marker=style.marker,
            markersize=6.5 + wider / 2,
            markeredgecolor="white",
            markeredgewidth=0.7,
            markevery=[index for index, x in enumerate(own.x) if x in own.marked],
            clip_on=not own.points,  # A marker at the end of an axis is whole; a line without points has no place.
            zorder=3 + rank / 1000,
        )
        lines.append(line)
    return lines


def handles(looks: Sequence[Look]) -> list[Line2D]:
    """Return what a legend shows of lines."""
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [],
            [],
            color=style.colour,
            linestyle=style.dashes,
            linewidth=style.width,
            marker=style.marker,
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
        )
        for style in looks
    ]


def alike_remarks(names: Sequence[str], upper: Sequence[Series], lower: Sequence[Series]) -> list[str]:
    """Return what a legend says of lines that lie on others: ", on the line of 1 above"; "" where a line does not.

    names: of the lines. upper, lower: the series of both panels.
    """
    remarks = []
    for place, on in enumerate(zip(first_alike(upper), first_alike(lower), strict=True)):
        above, below = on
        if above == below != place:
            remarks.append(f", on both lines of {names[above]}")
            continue
        found = {"above": above, "below": below}
        remarks.append("".join(f", on the line of {names[at]} {where}" for where, at in found.items() if at != place))
    return remarks


def set_ticks(axis: Axis, show: Callable[[float], str], base: int, most: int, steps: Sequence[float] = (1.0,)) -> None:
    """Give a logarithmic axis at most so many ticks, at `steps` times the powers of `base`, that `show` writes."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=base, subs=steps, numticks=most))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: show(value))


def context_axis(axes: Axes, contexts: Sequence[float]) -> None:
    """Make the lower axis one of contexts, on a logarithmic scale."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(contexts), max(contexts))
    set_ticks(axes.xaxis, lambda context: short_context(round(context)), base=2, most=13)
    axes.set_xlabel("context, tokens")


def log_axis(axes: Axes, show: Callable[[float], str], label: str) -> None:
    """Make the upright axis logarithmic, with as many ticks as its range needs."""
    _log_scale(axes, 10)
    low, high = axes.get_ylim()
    decades = log10(high / low) if low > 0 else 10
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    set_ticks(axes.yaxis, show, 10, 12, steps)
    axes.set_ylabel(label)


def share_axis(axes: Axes, names: Sequence[str], label: str, fontsize: float | None = None) -> None:
    """Let bars of `axes`, one below another from place 0 on, be read as shares of a whole, with a line at its half.

    names: what stands beside each bar. label: what the bars are shares of. fontsize: of the names, in points.
    """
    axes.axvline(0.5, color="0.15", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=fontsize)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(label)


def _log_scale(axes: Axes, base: int) -> None:
    axes.set_yscale("log", base=base)
    if not any(len(line.get_path()) for line in axes.lines):
        axes.set_ylim(0.1, 10)  # Without a line there are limits that no logarithmic scale has.


def ratio_axis(axes: Axes) -> None:
    """Make the upright axis one of weight-state FLOP ratios."""
    log_axis(axes, lambda value: format_ratio(Fraction(value)), "weight FLOPs : state FLOPs")


def bytes_axis(axes: Axes, label: str) -> None:
    """Make the upright axis one of bytes, with ticks at binary sizes."""
    _log_scale(axes, 2)
    set_ticks(axes.yaxis, lambda size: format_bytes(Fraction(size)), base=2, most=9)
    axes.set_ylabel(label)


BOX: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.8}
"""What stands behind a text on lines."""

_SMALL: dict[str, Any] = {"fontsize": 8.5, "color": "0.15", "bbox": BOX, "zorder": 2.5, "textcoords": "offset points"}


def level(axes: Axes, y: float, text: str, series: Sequence[Series] = ()) -> None:
    """Draw a level line with its name on it, where that meets the fewest of the lines of `series`.

    The upright axis is logarithmic, and grows where the line would be at its end or beyond.
    """
    axes.axhline(y, color="0.25", linewidth=1, zorder=2)
    low, high = axes.get_ylim()
    if not low * 1.4 < y < high / 1.4:
        axes.set_ylim(min(low, y / 1.6), max(high, y * 1.6))
    width, height = _size(axes, text)
    at = _fraction(axes.get_ylim(), y, axes.get_yscale())
    places = [
        (step / 50, above)
        for above in (True, False)
        for step in range(int(50 * (1 - width)))
        if 0 < at + (height if above else -height) < 1
    ] or [(0.0, True)]

    def met(place: tuple[float, bool]) -> int:
        left, above = place
        low = at if above else at - height
        return _points_in(axes, series, Box(left, left + width, low, low + height))

    left, above = min(places, key=met)
    axes.annotate(
        text,
        (left, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 5 if above else -5),
        ha="left",
        va="bottom" if above else "top",
        **_SMALL,
    )


def upright(
    axes: Axes,
    x: float,
    text: str = "",
    series: Sequence[Series] = (),
    *,
    strong: bool = False,
    taken: list[Box] | None = None,
) -> None:
    """Draw an upright line with its name beside it, where that meets the fewest of the lines of `series`.

    taken: where other names stand, in shares of the axes; this one is kept off them, and added.
    """
    axes.axvline(x, color="0.25" if strong else "0.8", linewidth=1, linestyle=(0, (3, 2)) if strong else "-", zorder=1)
    if not text:
        return
    boxes = [] if taken is None else taken
    width, height = _size(axes, text)
    at = _fraction(axes.get_xlim(), x, axes.get_xscale())
    sides = [right for right in (True, False) if (at + width < 1 if right else at > width)] or [at < 0.5]

    def box_at(place: tuple[float, bool]) -> Box:
        low, right = place
        left = at if right else at - width
        return Box(left, left + width, low, low + height)

    def met(place: tuple[float, bool]) -> int:
        own = box_at(place)
        return _points_in(axes, series, own) + 1000 * sum(map(own.meets, boxes))

    low, right = best = min([(step / 50, right) for step in range(1, 46) for right in sides], key=met)
    boxes.append(box_at(best))
    axes.annotate(
        text,
        (x, low),
        xycoords=axes.get_xaxis_transform(),
        xytext=(4 if right else -4, 0),
        ha="left" if right else "right",
        va="bottom",
        **_SMALL,
    )


@dataclass(frozen=True)
class Box:
    """A part of a panel, in shares of its width and height."""

    left: float
    right: float
    low: float
    high: float

    def holds(self, x: float, y: float) -> bool:
        return self.left <= x <= self.right and self.low <= y <= self.high

    def meets(self, other: Box) -> bool:
        return self.left < other.right and other.left < self.right and self.low < other.high and other.low < self.high


def value_label(axes: Axes, x: float, y: float, text: str) -> None:
    """Write a value above a marker."""
    left = _fraction(axes.get_xlim(), x, axes.get_xscale()) > 0.9
    axes.annotate(text, (x, y), xytext=(-5 if left else 5, 5), ha="right" if left else "left", va="bottom", **_SMALL)


def _size(axes: Axes, text: str) -> tuple[float, float]:
    """Return about how wide and high a small text is, as shares of the axes."""
    figure: Any = axes.figure
    place = axes.get_subplotspec()
    assert place is not None
    grid = place.get_gridspec()
    heights: Any = grid.get_height_ratios()
    wide = (figure.get_figwidth() - 1.2) / grid.ncols
    lines = text.split("\n")
    return 0.085 * (max(map(len, lines)) + 2) / wide, 0.18 * len(lines) / (heights[place.rowspan.start] * 0.85)


def _fraction(limits: tuple[float, float], value: float, scale: str) -> float:
    """Return where a value stands between the limits of an axis, 0 to 1."""
    low, high = limits
    if scale == "log":
        return log10(value / low) / log10(high / low)
    return (value - low) / (high - low)


STEPS = 8
"""Points on a piece of a line that are looked at, to find the place of a name that covers the fewest."""


def _points_in(axes: Axes, series: Sequence[Series], box: Box) -> int:
    """Return how many points of lines, STEPS on each piece, lie in a box."""
    x_scale, y_scale = (axes.get_xlim(), axes.get_xscale()), (axes.get_ylim(), axes.get_yscale())
    found = 0
    for own in series:
        points = [(_fraction(x_scale[0], x, x_scale[1]), _fraction(y_scale[0], y, y_scale[1])) for x, y in own.points]
        for (x1, y1), (x2, y2) in pairwise(points):
            if max(x1, x2) < box.left or min(x1, x2) > box.right:
                continue
            shares = [step / STEPS for step in range(STEPS)]
            found += sum(box.holds(x1 + (x2 - x1) * share, y1 + (y2 - y1) * share) for share in shares)
    return found
