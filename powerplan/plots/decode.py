"""The figure of `powerplan decode`: time or bytes of a token, and memory, over the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powerplan.dtypes import Dtypes
from powerplan.errors import listed
from powerplan.plots.figure import legend_below, name_of, panels, styled, titled
from powerplan.plots.lines import (
    Look,
    Series,
    alike_remarks,
    bytes_axis,
    draw,
    handles,
    level,
    log_axis,
    look,
    set_ticks,
    upright,
)
from powerplan.report.decode import Served
from powerplan.report.parts import dtypes_text, show_bytes
from powerplan.report.policies import policy_text
from powerplan.serving import MAX_BATCH, Fleet, Serving, Step
from powerplan.units import format_bytes, format_count, format_duration, format_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHORTEST = 64
"""Batches reach this at least."""

_BEYOND = 64
"""How many times the largest batch that was asked for the axis may reach, to show which batch fits."""


@dataclass(frozen=True)
class _Panel:
    """What a panel shows of a step, and how it makes its upright axis."""

    value: Callable[[Step], float]
    make_axis: Callable[[Axes], None]


@styled
def decode_figure(models: Sequence[Served], batches: Sequence[int], dtypes: Dtypes, fleet: Fleet | None) -> Figure:
    """Return a figure of what decoding takes over the batch, with a line for each model and context.

    Its panels are step time, tokens per second and memory, and without a device bytes moved per token and memory. The
    batches that were asked for are marked, those that exceed the device's memory are drawn thinner. Twins are dashed.

    Raises:
        MachineError: matplotlib is not installed.
    """
    shown = [(model, serving) for model in models for serving in model.servings]
    looks = _looks(models)
    sizes = _batches(batches, [serving for _, serving in shown])
    steps = [{batch: serving.step(batch) for batch in _with_largest(sizes, serving)} for _, serving in shown]
    kinds = _PANELS["timed" if fleet else "bytes"]
    figure, grid = panels([2.7] * len(kinds), share_x=True)
    drawn: list[list[Series]] = []
    for (axes,), kind in zip(grid, kinds, strict=True):
        series = [_fitting(own, kind, batches) for own in steps]
        drawn.append(series)
        draw(axes, series, looks)
        for own, style in zip(steps, looks, strict=True):
            _draw_rest(axes, own, kind, style)
        for batch in batches:
            upright(axes, batch)
        _batch_axis(axes, sizes, below=axes is grid[-1][0])
        kind.make_axis(axes)
    memory = grid[-1][0]
    if fleet is not None:
        whole = [Series(tuple((float(batch), _memory(step)) for batch, step in own.items())) for own in steps]
        level(memory, fleet.memory, f"memory of {fleet.name}: {format_bytes(fleet.memory)}", whole)
    titled(figure, _title(models, fleet), _below(models, dtypes, fleet))
    labels = [_label(model, serving, models) for model, serving in shown]
    names = [label.partition(": ")[0] for label in labels]
    remarks = alike_remarks(names, drawn[0], drawn[-1])
    legend_below(figure, handles(looks), [f"{label}{remark}" for label, remark in zip(labels, remarks, strict=True)])
    return figure


def _looks(models: Sequence[Served]) -> list[Look]:
    """Return the look of each model at each context: solid, and for twins that of their model, dashed."""
    contexts = len(models[0].servings)
    colours: list[int] = []
    for model in models:
        colours.append(colours[model.twin_of[0]] if model.twin_of else len(set(colours)))
    twins = any(model.twin_of for model in models)
    looks: list[Look] = []
    for model, colour in zip(models, colours, strict=True):
        for place in range(contexts):
            own = look(colour * contexts + place)
            dashes = (0, (5, 2)) if model.twin_of else "-" if twins else own.dashes
            looks.append(Look(own.colour, dashes, look(len(looks)).marker))
    return looks


def _batches(asked: Sequence[int], servings: Sequence[Serving]) -> list[int]:
    """Return the batches that lines have points at: powers of two, and those that were asked for."""
    largest = max((serving.largest_batch or 0 for serving in servings), default=0)
    high = max(_SHORTEST, *asked, min(2 * largest, _BEYOND * max(asked)))
    powers = [2**exponent for exponent in range(MAX_BATCH.bit_length()) if 2**exponent < 2 * high]
    return sorted({*(size for size in powers if size <= MAX_BATCH), *asked})


def _with_largest(sizes: Sequence[int], serving: Serving) -> list[int]:
    largest = serving.largest_batch
    inside = largest is not None and 1 <= largest <= sizes[-1]
    return sorted({*sizes, *([largest] if largest is not None and inside else [])})


def _fitting(steps: dict[int, Step], panel: _Panel, asked: Sequence[int]) -> Series:
    """Return the line of one model over the batches that fit; over all where there is no device."""
    points = ((float(batch), panel.value(step)) for batch, step in steps.items() if step.fits is not False)
    return Series(tuple(points), frozenset(map(float, asked)))


def _draw_rest(axes: Axes, steps: dict[int, Step], panel: _Panel, style: Look) -> None:
    """Draw the batches that do not fit as a thin line, and a bar across the line at the largest that does."""
    rest = [batch for batch, step in steps.items() if step.fits is False]
    if not rest:
        return
    last = max((batch for batch in steps if batch < rest[0]), default=None)
    batches = rest if last is None else [last, *rest]
    axes.plot(
        batches,
        [panel.value(steps[batch]) for batch in batches],
        color=style.colour,
        linewidth=0.8,
        linestyle=(0, (1, 2)),
        zorder=2.8,
    )
    if last is not None:
        axes.plot(
            [last], [panel.value(steps[last])], color=style.colour, marker="|", markersize=16, markeredgewidth=2.2
        )


def _batch_axis(axes: Axes, sizes: Sequence[int], *, below: bool) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.08, sizes[-1] * 1.08)
    set_ticks(axes.xaxis, lambda batch: f"{round(batch):,}", base=2, most=18)
    axes.set_xlabel("batch, sequences decoded together" if below else "")


def _show_rate(tokens: float) -> str:
    return format_count(round(tokens)) if tokens >= 10 else format_figure(tokens)


def _memory(step: Step) -> float:
    return float(step.memory_bytes)


_MEMORY = _Panel(_memory, lambda axes: bytes_axis(axes, "memory, weights and state"))
_PANELS: dict[str, list[_Panel]] = {
    "timed": [
        _Panel(lambda step: float(step.seconds or 0), lambda axes: log_axis(axes, format_duration, "step time")),
        _Panel(
            lambda step: float(step.tokens_per_s or 0),
            lambda axes: log_axis(axes, _show_rate, "tokens per second"),
        ),
        _MEMORY,
    ],
    "bytes": [
        _Panel(
            lambda step: float(step.moved_bytes / step.batch), lambda axes: bytes_axis(axes, "bytes moved per token")
        ),
        _MEMORY,
    ],
}


def _title(models: Sequence[Served], fleet: Fleet | None) -> str:
    names = [name_of(model.accounting.spec) for model in models if model.twin_of is None]
    contexts = listed([f"{serving.context:,}" for serving in models[0].servings], "and")
    place = f" on {fleet.name}" if fleet else ""
    return f"{names[0] if len(names) == 1 else 'Decoding'} at {contexts} tokens{place}, over the batch"


def _below(models: Sequence[Served], dtypes: Dtypes, fleet: Fleet | None) -> str:
    formats = dtypes_text([model.accounting.spec for model in models], dtypes)
    if policy := policy_text(models[0].servings[0].policy):
        formats += f"; {policy}"
    if fleet is None:
        return f"one step, at the end of the context; {formats}"
    return f"rooflines of one step, at the end of the context; dotted: batches that do not fit; {formats}"


def _label(model: Served, serving: Serving, models: Sequence[Served]) -> str:
    name = name_of(model.accounting.spec)
    if model.twin_of is not None:
        place, kind = model.twin_of
        name = f"{kind} twin of {name_of(models[place].accounting.spec)}"
    text = f"{name} at {serving.context:,}: state {show_bytes(serving.state_bytes)} per sequence"
    fleet = serving.fleet
    if fleet is None:
        return text
    most = serving.largest_batch
    if serving.device_bytes > fleet.memory:
        return f"{text}, the weights do not fit"
    if most is None:
        return f"{text}, any batch fits"
    return f"{text}, largest batch {most:,}" if most else f"{text}, not one sequence fits"
