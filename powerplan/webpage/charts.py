"""Charts as Vega-Lite specs: plain data, with colours that are variables of the page's style (dark or light)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor, log2, log10
from typing import Any, Literal

from powerplan.units import format_ratio
from powerplan.webpage.content import AS_IT_IS, Curve, Mark

Unit = Literal["context", "count", "ratio", "bytes", "seconds", "rate"]

Axis = tuple[str, Unit]
"""The title of an axis, and how it writes its values."""

CONTEXTS: Axis = ("context, tokens", "context")

_THOUSANDS = ((2**30, "G"), (2**20, "M"), (2**10, "k"))
_BYTES = ((2**50, " PiB"), (2**40, " TiB"), (2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"))
_DECIMAL = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def _scaled(steps: Sequence[tuple[int, str]], last: str = "") -> str:
    """Return an expression of Vega that writes an axis's value with the first suffix that it reaches."""
    text = f"format(datum.value, ',.3~r') + '{last}'"
    for size, suffix in reversed(steps):
        text = f"datum.value >= {size} ? format(datum.value / {size}, ',.4~r') + '{suffix}' : {text}"
    return text


LABELS: dict[Unit, str] = {
    "context": _scaled(_THOUSANDS),
    "count": "format(datum.value, ',')",
    "ratio": ("datum.value >= 1 ? format(datum.value, ',.3~r') + ':1' : '1:' + format(1 / datum.value, ',.3~r')"),
    "bytes": _scaled(_BYTES, " B"),
    "rate": _scaled(_DECIMAL),
    "seconds": (
        "datum.value >= 1 ? format(datum.value, ',.3~r') + ' s' : datum.value >= 0.001 ? "
        "format(datum.value * 1000, '.3~r') + ' ms' : format(datum.value * 1000000, '.3~r') + ' µs'"
    ),
}
"""How axes write their values, as expressions of Vega."""

CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "gridColor": "var(--grid)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 10,
        "labelPadding": 6,
    },
}


def curves_chart(
    description: str,
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    across: Sequence[Mark] = (),
    upright: Sequence[Mark] = (),
    height: int = 320,
) -> dict[str, Any]:
    """Return a chart of curves over logarithmic axes, which shows all values where the pointer is.

    x, y: the axes. across: lines at values of y, such as a capacity. upright: lines at
    values of x, such as a context. Which curves are drawn is the parameter `shown`, a list of their keys; the page's
    script sets it, and makes the tooltips of what `usermeta` holds.
    """
    places = sorted({point.x for curve in curves for point in curve.points})
    values = [*(point.y for curve in curves for point in curve.points), *(mark.at for mark in across)]
    ends = _room(min(values), max(values), labels=len(upright))
    x_axis = _axis(*x, _powers_of_two(places[0], places[-1], 12), [places[0], places[-1]])
    y_axis = _axis(*y, _ticks(y[1], *ends), ends)
    return {
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "params": [{"name": "shown", "value": [curve.key for curve in curves if curve.shown]}],
        "datasets": {
            "points": [{"key": curve.key, "x": point.x, "y": point.y} for curve in curves for point in curve.points],
            "tips": [],
        },
        "layer": [
            *_lines_upright(upright, x_axis, places),
            _lines(curves, x_axis, y_axis),
            *_lines_across(across, y_axis),
            *_pointer(x_axis),
        ],
        "config": CONFIG,
        "usermeta": {
            "tips": _tips(curves, places, "tokens" if x[1] == "context" else "sequences"),
            "names": {curve.key: curve.name for curve in curves},
        },
    }


def _lines(curves: Sequence[Curve], x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, Any]:
    """Return the curves that `shown` names, each in its colour and dashes; the first change, if any, is wider."""
    strong = next((curve.key for curve in curves if curve.colour != AS_IT_IS), curves[0].key)

    def by_key(values: list[Any], kind: str = "nominal") -> dict[str, Any]:
        scale = {"domain": [curve.key for curve in curves], "range": values}
        return {"field": "key", "type": kind, "scale": scale, "legend": None}

    return {
        "data": {"name": "points"},
        "transform": [{"filter": "indexof(shown, datum.key) >= 0"}],
        "mark": {"type": "line", "strokeJoin": "round", "interpolate": "monotone", "clip": True},
        "encoding": {
            "x": {"field": "x", "type": "quantitative", **x_axis},
            "y": {"field": "y", "type": "quantitative", **y_axis},
            "color": by_key([curve.colour for curve in curves]),
            "strokeDash": by_key([list(curve.dash or (1, 0)) for curve in curves]),
            "strokeWidth": by_key([3 if curve.key == strong else 1.8 for curve in curves], "ordinal"),
        },
    }


def _pointer(x_axis: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what answers the pointer: a line at the nearest context or batch, and the texts of all curves there."""
    at_pointer = {"condition": {"param": "pointer", "empty": False, "value": 1}, "value": 0}
    pointer = {"name": "pointer", "select": {"type": "point", "on": "pointerover", "clear": "pointerout"}}
    return [
        {
            "data": {"name": "tips"},
            "mark": {"type": "rule", "color": "var(--muted)", "strokeWidth": 1, "aria": False},
            "encoding": {"x": {"field": "x", "type": "quantitative", **x_axis}, "opacity": at_pointer},
        },
        {
            "data": {"name": "tips"},
            "params": [pointer],
            "mark": {"type": "rect", "fill": "transparent", "aria": False, "tooltip": {"signal": "datum.tip"}},
            "encoding": {"x": {"field": "low", "type": "quantitative", **x_axis}, "x2": {"field": "high"}},
        },
    ]


def columns_chart(description: str, layers: Sequence[tuple[float, float, str]], top: float) -> dict[str, Any]:
    """Return a chart with one column for each layer: weight FLOPs and, on top of them, state FLOPs per token.

    layers: for each layer both, and what it is with its figures. top: the end of the upward axis.
    """
    rows = []
    for place, (weight, state, text) in enumerate(layers):
        for side, start, stop in (("weights", 0.0, weight), ("state", weight, weight + state)):
            rows.append({"x": place - 0.44, "x2": place + 0.44, "low": start, "high": stop, "side": side, "text": text})
    scale = {"domain": ["weights", "state"], "range": ["var(--w0)", "var(--s0)"]}
    return {
        "description": description,
        "width": "container",
        "height": 190,
        "autosize": {"type": "fit", "contains": "padding"},
        "data": {"values": rows},
        "mark": {"type": "rect", "tooltip": {"signal": "datum.text"}, "aria": False},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "scale": {"domain": [-0.6, len(layers) - 0.4], "nice": False},
                "axis": {"title": "layer", "grid": False, "tickMinStep": 1, "format": "d", "labelOverlap": "parity"},
            },
            "x2": {"field": "x2"},
            "y": {
                "field": "low",
                "type": "quantitative",
                "scale": {"domain": [0, top], "nice": True},
                "axis": {"title": "FLOPs per token", "labelExpr": LABELS["rate"], "tickCount": 4},
            },
            "y2": {"field": "high"},
            "color": {"field": "side", "type": "nominal", "scale": scale, "legend": None},
        },
        "config": CONFIG,
    }


def _axis(title: str, unit: Unit, ticks: Sequence[float], domain: Sequence[float]) -> dict[str, Any]:
    return {
        "scale": {"type": "log", "domain": list(domain), "nice": False},
        "axis": {
            "title": title,
            "values": list(ticks),
            "labelExpr": LABELS[unit],
            "labelOverlap": "parity",
            "labelSeparation": 8,
        },
    }


def _powers_of_two(low: float, high: float, most: int) -> list[int]:
    """Return powers of two within a range, every first, second, third ... of them: at most about `most`."""
    first, last = ceil(log2(max(low, 1))), floor(log2(max(high, 1)))
    step = max(1, ceil((last - first + 1) / most))
    return [2**exponent for exponent in range(first, last + 1, step)]


def _ticks(unit: Unit, start: float, stop: float) -> list[float]:
    """Return round values of an axis: powers of two for bytes, else 1, 2 and 5 times powers of ten, or more of them."""
    if unit == "bytes":
        return [float(value) for value in _powers_of_two(start, stop, 9)]
    decades = range(floor(log10(start)), ceil(log10(stop)) + 1)
    few = log10(stop / start)
    factors: tuple[float, ...] = (1, 3) if few < 4 and unit != "ratio" else (1,)
    if few < 2.5:
        factors = (1, 2, 5) if few > 0.8 or unit == "ratio" else (1, 1.5, 2, 3, 4, 5, 6, 8)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    if unit == "ratio":  # 1:2 and 1:5 on the other side of 1:1, as 2:1 and 5:1 are.
        values = sorted({value if value >= 1 else 1 / round(1 / value) for value in values})
    return [value for value in values if start <= value <= stop]


def _room(low: float, high: float, labels: int) -> list[float]:
    """Return the ends of a logarithmic axis with room above and below the values, and above for so many labels."""
    span = max(high / low, 4)
    spare = max(1.0, 2 / (high / low) ** 0.5)
    return [low / spare / span**0.05, high * spare * span ** (0.05 + 0.05 * labels)]


def _tips(curves: Sequence[Curve], places: Sequence[int], unit: str) -> list[dict[str, Any]]:
    """Return for each x the range in which the pointer is nearest to it, and the texts of all curves by their keys."""
    texts = {curve.key: {point.x: point.text for point in curve.points} for curve in curves}
    edges = [float(places[0]), *((low * high) ** 0.5 for low, high in pairwise(places)), float(places[-1])]
    return [
        {
            "x": x,
            "low": edges[number],
            "high": edges[number + 1],
            "title": f"{x:,} {unit}",
            "texts": {key: own[x] for key, own in texts.items() if x in own},
        }
        for number, x in enumerate(places)
    ]


def _lines_across(marks: Sequence[Mark], axis: dict[str, Any]) -> list[dict[str, Any]]:
    y = {"field": "y", "type": "quantitative", **axis}
    data = {"values": [{"y": mark.at, "text": mark.label} for mark in marks]}
    rule = {"type": "rule", "color": "var(--ink)", "strokeWidth": 1.4, "strokeDash": [2, 6]}
    text = {"align": "left", "baseline": "bottom", "dy": -4, "fill": "var(--ink)"}
    if not marks:
        return []
    place = {"y": y, "x": {"value": 6}, "text": {"field": "text"}}
    return [{"data": data, "mark": rule, "encoding": {"y": y}}, *_words(data, text, place)]


def _words(data: dict[str, Any], text: dict[str, Any], place: dict[str, Any]) -> list[dict[str, Any]]:
    """Return words in a chart, upon an outline in the colour of the page that keeps lines away from them."""
    shared = {"type": "text", "fontSize": 12, **text}
    outline = {**shared, "stroke": "var(--card)", "strokeWidth": 4, "strokeJoin": "round", "aria": False}
    return [{"data": data, "mark": mark, "encoding": place} for mark in (outline, shared)]


def _lines_upright(marks: Sequence[Mark], axis: dict[str, Any], places: Sequence[int]) -> list[dict[str, Any]]:
    """Return lines with labels at their upper ends, each label below the one before, on the side that has room.

    What was asked about has its label on the right, everything else on the left, so that neighbours keep apart.
    """
    layers: list[dict[str, Any]] = []
    start, stop = log2(max(places[0], 1)), log2(max(places[-1], 2))
    for number, mark in enumerate(sorted(marks, key=lambda mark: mark.at)):
        left = (log2(mark.at) - start) / max(stop - start, 1) > (0.7 if mark.asked else 0.4)
        x = {"field": "x", "type": "quantitative", **axis}
        data = {"values": [{"x": mark.at, "text": mark.label}]}
        colour = "var(--ink)" if mark.asked else "var(--muted)"
        rule = {"type": "rule", "color": colour, "strokeWidth": 1.2, "strokeDash": [1, 0] if mark.asked else [2, 3]}
        align = {"align": "right", "dx": -5} if left else {"align": "left", "dx": 5}
        layers.append({"data": data, "mark": rule, "encoding": {"x": x}})
        encoding = {"x": x, "y": {"value": 4 + 16 * number}, "text": {"field": "text"}}
        layers += _words(data, {"baseline": "top", "fill": colour, **align}, encoding)
    return layers


def ratio_mark(target: Fraction) -> Mark:
    """Return the line of the wanted ratio."""
    text = format_ratio(target)
    return Mark(float(target), "1:1, as many state as weight FLOPs" if target == 1 else f"target {text}")
