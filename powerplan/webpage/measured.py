"""Measured times beside predicted ones, of a saved profile."""

from __future__ import annotations

from powerplan.measured import MeasuredTimes, Measurement
from powerplan.report.tables import Column, grouped
from powerplan.units import format_duration, format_figure
from powerplan.webpage.charts import CONTEXTS, curves_chart
from powerplan.webpage.content import CANDIDATES, Chart, Curve, Key, Point, Table, curves_table, table_from

PASSES = ("forward", "forward+backward", "decode")


def measured_words(times: MeasuredTimes, elsewhere: str | None) -> list[str]:
    """Return where the times come from, in sentences.

    elsewhere: the device that the page counts with, where it is another one.
    """
    saved = times.saved
    torch, date = (f", torch {saved.torch}" if saved.torch else ""), (f", {saved.date}" if saved.date else "")
    peak = saved.peak_of or "the device's peak"
    mixers = len({row.name for row in _alone(times)})
    few = f"The charts have the first {len(CANDIDATES)} of {mixers} mixers, the table all of them."
    unused = f"The other sections count with {elsewhere}, and so without these times."
    return [
        f"Measured on {saved.device}{torch}{date}, read from {times.path}.",
        f"Predicted is a roofline, max(FLOPs / peak, bytes / bandwidth), with the peak of {peak}: no kernel is faster.",
        *([unused] if elsewhere else []),
        *([few] if mixers > len(CANDIDATES) else []),
    ]


def measured_table(times: MeasuredTimes) -> Table:
    """Return each time of a mixer alone beside what was predicted, and how many times as long it took."""
    rows = [
        {
            "pass": row.direction,
            "context": row.context,
            "name": row.name,
            "measured": row.ms_p50 / 1000,
            "predicted": None if row.predicted_ms is None else row.predicted_ms / 1000,
            "times": None if row.predicted_ms is None else row.ms_p50 / row.predicted_ms,
        }
        for row in sorted(_alone(times), key=lambda row: (PASSES.index(row.direction), row.context))
    ]
    columns = [
        Column("pass", "pass", left=True),
        Column("context", "context", grouped),
        Column("name", "mixer alone", left=True),
        Column("measured", "measured", _seconds),
        Column("predicted", "predicted", _seconds),
        Column("times", "measured / predicted", lambda value: "-" if value is None else f"{format_figure(value)}x"),
    ]
    return table_from("Measured and predicted times of mixers", columns, rows)


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_duration(value)


def _alone(times: MeasuredTimes) -> list[Measurement]:
    return [row for row in times.saved.results if row.part == "state"]


def measured_charts(times: MeasuredTimes) -> tuple[list[Key], list[Chart]]:
    """Return for each pass the measured and the predicted times over the context, and what the colours mean."""
    rows = _alone(times)
    colours = dict(zip(dict.fromkeys(row.name for row in rows), CANDIDATES, strict=False))
    charts = []
    for number, direction in enumerate(PASSES):
        curves: list[Curve] = []
        for name in colours:
            own = sorted(
                (row for row in rows if row.name == name and row.direction == direction), key=lambda row: row.context
            )
            found = [Point(row.context, row.ms_p50 / 1000, format_duration(row.ms_p50 / 1000)) for row in own]
            ideal = [
                Point(row.context, row.predicted_ms / 1000, format_duration(row.predicted_ms / 1000))
                for row in own
                if row.predicted_ms
            ]
            if found:
                curves.append(Curve(f"m{len(curves)}", f"{name}, measured", colours[name], tuple(found)))
            if ideal:
                curves.append(Curve(f"p{len(curves)}", f"{name}, predicted", colours[name], tuple(ideal), dash=(4, 4)))
        if any(len(curve.points) > 1 for curve in curves):
            about = f"Times of mixers over the context, {direction} pass, measured and predicted, axes logarithmic"
            spec = curves_chart(about, curves, CONTEXTS, ("time", "seconds"), height=260)
            table = curves_table(f"Times, {direction}", curves)
            charts.append(Chart(f"chart-measured-{number}", direction, spec, table))
    return [Key(colour, name) for name, colour in colours.items()], charts
