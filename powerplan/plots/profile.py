"""The figure of `powerplan profile`: throughput over the context, and where the time of a layer goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from powerplan.curves import short_context
from powerplan.errors import InputError, parameter
from powerplan.plots.figure import WIDTH, cut, legend_below, panels, styled, titled
from powerplan.plots.lines import (
    STATE,
    WEIGHTS,
    Box,
    Look,
    Series,
    context_axis,
    draw,
    handles,
    log_axis,
    look,
    share_axis,
    upright,
)
from powerplan.profile.result import Profile, Split

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FILLS: dict[str, dict[str, Any]] = {
    "projections": {"facecolor": WEIGHTS},
    "ffn": {"facecolor": "#A6CBE3"},
    "state": {"facecolor": STATE, "hatch": "////"},
}


@styled
def profile_figure(profile: Profile) -> Figure:
    """Return a figure of a profile, with two panels for each pass.

    The upper one shows the tokens per second of each mixer alone over the context, and names the crossovers; the lower
    one shows the shares of projections, FFN and state in the layer's time at every context.

    Raises:
        InputError: The profile holds no times of mixers.
        MachineError: matplotlib is not installed.
    """
    from matplotlib.patches import Patch

    passes = list(dict.fromkeys(row.direction for row in profile.part("state")))
    if not passes:
        raise InputError("the profile holds no times of mixers to draw", parameter("plot"))
    names = dict.fromkeys(row.name for row in profile.part("state") if row.tokens_per_s)
    looks = {name: look(place) for place, name in enumerate(names)}
    bars = max(sum(row.direction == direction for row in profile.split) for direction in passes)
    heights = [3.6, 0.7 + 0.21 * bars] if bars else [3.6]
    figure, grid = panels(heights, columns=len(passes), width=max(WIDTH, 0.5 + 5.2 * len(passes)))
    for column, direction in enumerate(passes):
        _throughput(grid[0][column], profile, direction, looks)
        if bars:
            _time_split(grid[1][column], profile, direction)
    threads = f", {profile.threads} threads" if profile.threads else ""
    titled(
        figure,
        f"{profile.layer.model} on {profile.device}",
        f"one layer of width {profile.layer.hidden_size:,}, {profile.dtype}, batch {profile.batch}{threads}; "
        "above each mixer alone, below one layer",
    )
    shown, labels = handles(list(looks.values())), list(looks)
    parts = [part for part in _FILLS if bars and (part != "ffn" or any(row.ffn_ms for row in profile.split))]
    patches: list[Any] = [Patch(**_FILLS[part], edgecolor="white") for part in parts]
    words = {"projections": "projections, weights", "ffn": "FFN, weights", "state": "mixer, state"}
    legend_below(figure, [*shown, *patches], [*labels, *(words[part] for part in parts)])
    return figure


def _throughput(axes: Axes, profile: Profile, direction: str, looks: Mapping[str, Look]) -> None:
    rows = [row for row in profile.part("state", direction) if row.tokens_per_s]
    series = []
    for name in looks:
        measured = [(float(row.context), row.tokens_per_s) for row in rows if row.name == name and row.tokens_per_s]
        points = sorted(measured + _from_crossovers(profile, name, direction)) if measured else []
        series.append(Series(tuple(points), frozenset(x for x, _ in points)))
    draw(axes, series, list(looks.values()))
    axes.margins(y=0.14)
    contexts = sorted({round(x) for own in series for x in own.x})
    context_axis(axes, [min(contexts, default=1) / 1.15, max(contexts, default=2) * 1.15])
    log_axis(axes, lambda value: f"{value:,.0f}", "tokens per second, mixer alone")
    axes.set_title(direction, loc="left", fontsize=10, fontweight="bold")
    taken: list[Box] = []
    for crossover in profile.crossover:
        if crossover.direction == direction and crossover.context is not None:
            text = f"{cut(crossover.name, 20)} faster than {cut(crossover.against, 20)}\nfrom {crossover.context:,}"
            upright(axes, crossover.context, text, series, strong=True, taken=taken)


def _time_split(axes: Axes, profile: Profile, direction: str) -> None:
    rows = sorted((row for row in profile.split if row.direction == direction), key=lambda row: row.context)
    places, start = list(range(len(rows))), [0.0] * len(rows)
    for part, fill in _FILLS.items():
        shares = [_ms(row, part) / (row.weight_ms + row.state_ms) for row in rows]
        axes.barh(places, shares, left=start, height=0.8, edgecolor="white", linewidth=0.6, **fill)
        start = [left + share for left, share in zip(start, shares, strict=True)]
    names = [f"{short_context(row.context)} {cut(row.name, 28)}" for row in rows]
    share_axis(axes, names, "share of the layer's time; 1:1 at 50%", fontsize=8.5)


def _ms(row: Split, part: str) -> float:
    milliseconds: float | None = getattr(row, f"{part}_ms")
    return milliseconds or 0.0


def _from_crossovers(profile: Profile, name: str, direction: str) -> list[tuple[float, float]]:
    """Return contexts and tokens per second of a mixer that were measured only to find its crossover."""
    known = {row.context for row in profile.part("state", direction) if row.name == name}
    points = {}
    for crossover in profile.crossover:
        if crossover.direction == direction and name in (crossover.name, crossover.against):
            for times in crossover.tried:
                tokens = profile.batch * (1 if direction == "decode" else times.context)
                ms = times.ms if name == crossover.name else times.against_ms
                if times.context not in known:
                    points[float(times.context)] = tokens / ms * 1000
    return list(points.items())
