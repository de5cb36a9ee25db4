"""`powerplan profile`: the crossovers, a table of the mixers alone, and how the layer's time splits."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from operator import itemgetter
from typing import Any

import msgspec

from powerplan.measured import SCHEMA, Measurement
from powerplan.profile.result import PASSES, Crossover, Missing, Profile, Split
from powerplan.report.colour import side_of
from powerplan.report.parts import show_ratio
from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.units import format_bytes, format_count, format_duration, format_quantity

DIRECTIONS = tuple(PASSES.values())
"""Passes in the order of the tables."""

SLOW_LAYER = 1.5
"""A layer that takes this many times as long as its parts is remarked: on a quiet machine it was 0.8 to 1.1 times."""


def profile_report(profile: Profile) -> Report:
    """Return the report of a profile, for `render`. Tables have the mixers alone, CSV all timings."""
    crossovers = [line for crossover in profile.crossover for line in wrapped(crossover_text(crossover))]
    before = [*_head(profile), *(["", *crossovers] if crossovers else [])]
    alone = _by_pass(_COLUMNS, [*map(_table_row, profile.part("state"))], "the mixer alone")
    legend = ["", *_legend(profile)] if alone else []
    sections = [Report(SCHEMA, {}, [], [], before=before, legend=legend), *alone, *_splits(profile)]
    sections += [_lines(lines) for lines in (_slow_layers(profile), _chunk_sizes(profile)) if lines]
    sections += _breakdowns(profile)
    if missing := _missing(profile):
        sections.append(_lines(missing))
    rows = [_table_row(row) for row in sorted(profile.results, key=_in_order)]
    return Report(SCHEMA, msgspec.to_builtins(profile), _CSV_COLUMNS, rows, sections=sections)


def _by_pass(columns: list[Column], rows: list[dict[str, Any]], what: str) -> list[Report]:
    """Return a table for each pass, whose rows are in the order of their contexts."""
    tables = []
    for direction in DIRECTIONS:
        own = sorted((row for row in rows if row["pass"] == direction), key=itemgetter("context"))
        if own:
            tables.append(Report(SCHEMA, {}, columns, own, title=[f"{direction}, {what}:"]))
    return tables


def _lines(lines: list[str]) -> Report:
    return Report(SCHEMA, {}, [], [], before=lines)


def _in_order(row: Measurement | Split) -> tuple[int, int]:
    return DIRECTIONS.index(row.direction), row.context


def _head(profile: Profile) -> list[str]:
    """Return the layer, the machine, and the largest error of the checks."""
    layer = profile.layer
    first = (profile.part("state") or profile.results)[0]
    kv_heads = "" if first.heads == first.kv_heads else f" ({first.kv_heads} kv)"
    sizes = [f"{first.heads}{kv_heads} heads of {first.head_dim}", f"hidden size {layer.hidden_size:,}"]
    sizes += [*filter(None, [layer.ffn]), profile.dtype, f"batch {profile.batch}"]
    threads = f" ({profile.threads} threads)" if profile.threads else ""
    product, copy = _quantity(profile.matmul_flops_per_s, "FLOP/s"), _quantity(profile.copy_bytes_per_s, "B/s")
    rates = f"matrix product {product}, copy {copy}"
    lines = wrapped(", ".join(sizes), f"{layer.model}, {layer.positions}: ", 4)
    lines += wrapped(f"on {profile.device}{threads}, torch {profile.torch}, {profile.date}: {rates}")
    if profile.checks:
        worst = max(check.share_of_budget for check in profile.checks)
        # Kernels first; attention is checked in a layer only.
        checks = sorted(profile.checks, key=lambda check: check.name.startswith("layer with "))
        names = dict.fromkeys(f"{check.name.removeprefix('layer with ')} ({check.impl})" for check in checks)
        text = f"{', '.join(names)}: largest error {worst:.0%} of what is allowed"
        lines += wrapped(text, "checked against float64: ", 4)
    checked = {check.impl for check in profile.checks}
    timed = {row.name: None for row in profile.results if row.part in ("state", "layer") and row.impl not in checked}
    if timed:
        lines += wrapped(", ".join(timed), "not checked: ", 4)
    if profile.interrupted:
        lines.append("interrupted: what was measured until then")
    return lines


def crossover_text(crossover: Crossover) -> str:
    """Return one crossover in a sentence, with its context in two figures."""
    what, slower_at, faster_at = f"{crossover.direction}: {crossover.name}", crossover.slower_at, crossover.faster_at
    if crossover.context is not None:
        about = f"{_figures(crossover.context, 2):,.0f} tokens"
        between = f"(slower at {slower_at:,}, faster at {faster_at:,})"
        return f"{what} overtakes {crossover.against} at about {about} {between}"
    if slower_at is None:
        return f"{what} is faster than {crossover.against} at {faster_at:,} tokens already, and beyond"
    text = f"{what} does not overtake {crossover.against} up to {slower_at:,} tokens"
    if crossover.estimate and len(crossover.tried) > 1:  # One short context says nothing of how the times grow.
        about = f"{_figures(crossover.estimate, 2):,.0f}"
        text += f", where time or memory ended the search; it would be at about {about}"
    elif crossover.estimate:
        text += ", where time or memory ended the search"
    return text


def _table_row(row: Measurement) -> dict[str, Any]:
    raw: dict[str, Any] = msgspec.to_builtins(row)
    flops_per_s = None if row.tflops is None else row.tflops * 1e12
    over_predicted = None if row.predicted_ms is None else row.ms_p50 / row.predicted_ms
    return raw | {"flops_per_s": flops_per_s, "over_predicted": over_predicted, "spread": _spread(row)}


def _spread(row: Measurement) -> str:
    """Return how far the 20th or 80th percentile is from the median, whichever is farther; "1 run" for one run."""
    if row.repeats < 2:
        return "1 run"
    if row.ms_p20 is None or row.ms_p80 is None:
        return ""
    share = max(row.ms_p50 - row.ms_p20, row.ms_p80 - row.ms_p50) / row.ms_p50
    return f"{share:.0%}" if share < 1 else ">99%"


def _figures(value: float, figures: int) -> float:
    return float(f"{value:.{figures}g}")


def _factor(value: float) -> str:
    """Return a factor with two figures, "1.7x"."""
    return f"{value:.2g}x" if value < 100 else f"{round(value):,}x"


def _rate(value: float) -> str:
    """Return a rate with three figures, "96.6G"."""
    return format_count(Fraction(_figures(value, 3)))


def _quantity(rate: float, unit: str) -> str:
    """Return a rate with three figures and its unit: "96.6 GB/s"."""
    return format_quantity(Fraction(_figures(rate, 3)), unit)


def _bytes(value: int) -> str:
    """Return bytes with three figures, "23.2 MiB"."""
    number, unit = format_bytes(value).split(" ")
    return f"{_figures(float(number.replace(',', '')), 3):g} {unit}"


def _column(key: str, heading: str, show: Callable[[Any], str]) -> Column:
    """Return a column that is empty where there is no value."""
    return Column(key, heading, lambda value: "" if value is None else show(value))


def _ms_column(key: str, heading: str) -> Column:
    return _column(key, heading, lambda value: format_duration(value / 1000))


_KEY_COLUMNS = [
    Column("context", "context", grouped),
    Column("name", "mixer", left=True),
]

_COLUMNS = [
    *_KEY_COLUMNS,
    _ms_column("ms_p50", "time"),
    Column("spread", "±"),
    _column("tokens_per_s", "tok/s", _rate),
    _column("flops_per_s", "FLOP/s", _rate),
    _column("share_of_matmul", "share", lambda share: f"{share:.0%}"),
    _ms_column("predicted_ms", "ideal"),
    _column("over_predicted", "x", _factor),
    _column("peak_bytes", "peak", _bytes),
]

_CSV_COLUMNS = [
    Column(key, key)
    for key in (
        *("part", "name", "impl", "pass", "context", "ms_p20", "ms_p50", "ms_p80", "repeats", "tokens_per_s", "tflops"),
        *("share_of_matmul", "predicted_ms", "peak_bytes", "mixer", "heads", "kv_heads", "head_dim", "p", "window"),
        *("chunk_size", "gated", "batch", "dtype"),
    )
]


def _ratio_column(key: str, heading: str) -> Column:
    return Column(
        key,
        heading,
        lambda value: "" if value is None else show_ratio(value),
        role=lambda value: None if value is None else side_of(value),
    )


_SPLIT_COLUMNS = [
    *_KEY_COLUMNS,
    _ms_column("projections_ms", "projections"),
    _ms_column("ffn_ms", "FFN"),
    _ms_column("state_ms", "state"),
    Column("layer", "layer, as\na whole"),
    _ratio_column("wsfr_time", "WSFR\nin time"),
    _ratio_column("wsfr_flops", "WSFR\nin FLOPs"),
]


def _slow_layers(profile: Profile) -> list[str]:
    """Return the layers that took far longer than their parts, which were timed before them."""
    lines: list[str] = []
    for split in sorted(profile.split, key=_in_order):
        factor = (split.layer_ms or 0.0) / (split.weight_ms + split.state_ms)
        if factor >= SLOW_LAYER:
            text = f"the layer with {split.name} at {split.context:,} tokens took {_factor(factor)} the time of its "
            text += "parts; other programs may have used the machine then"
            lines += wrapped(text, f"{split.direction}: ", 4)
    return lines


def _splits(profile: Profile) -> list[Report]:
    """Return the table of how a layer's time splits; none where no layer was timed."""
    whole = {(row.name, row.direction, row.context): row for row in profile.part("layer")}
    alone = {(row.name, row.direction, row.context): row for row in profile.part("state")}
    split = {(row.name, row.direction, row.context): row for row in profile.split}
    rows = []
    # Projections of recurrent kinds are not timed, so that their layers have no split.
    for key in dict.fromkeys((*(key for key in alone if key in split or key in whole), *split)):
        row: dict[str, Any] = dict.fromkeys(column.key for column in _SPLIT_COLUMNS)
        row |= dict(zip(("name", "pass", "context"), key, strict=True))
        row |= msgspec.to_builtins(split[key]) if key in split else {"state_ms": alone[key].ms_p50}
        layer = whole.get(key)
        once = "" if layer is None or layer.repeats > 1 else "*"
        rows.append(row | {"layer": "" if layer is None else format_duration(layer.ms_p50 / 1000) + once})
    legend = wrapped(
        "The layer in parts. projections, FFN: each timed alone; state: the mixer alone, as above; *: one run. WSFR in "
        "time: projections and FFN over state; WSFR in FLOPs: that of their FLOPs, as wsfr counts "
        "them, without the LM head." + " Projections of recurrent kinds are not timed apart." * (len(rows) > len(split))
    )
    return [Report(SCHEMA, {}, [], [], legend=legend), *_by_pass(_SPLIT_COLUMNS, rows, "the layer")] if rows else []


def _chunk_sizes(profile: Profile) -> list[str]:
    """Return the fastest chunk size of each mixer, pass and context for which several were timed."""
    lines = []
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for row in profile.part("state"):
        if row.chunk_size and row.p:
            shape = (row.p, row.heads, row.kv_heads, row.head_dim, row.gated)
            groups.setdefault((row.direction, row.context, row.impl, *shape), []).append(row)
    for (direction, context, *_), rows in groups.items():
        times = {row.chunk_size: row.ms_p50 for row in rows if row.chunk_size}
        if len(times) > 1:
            best = min(times, key=lambda size: times[size])
            others = ", ".join(f"{size:,} {times[size] / times[best]:.2f}x" for size in sorted(times) if size != best)
            # The first was timed with its own chunk size, under its own name; the others followed.
            name = rows[0].name.partition(" chunk ")[0]
            text = f"{best:,} tokens is the fastest chunk of {name} at {context:,} tokens; {others} its time"
            lines += wrapped(text, f"{direction}: ", 4)
    return lines


def _breakdowns(profile: Profile) -> list[Report]:
    tables = []
    for run in profile.breakdown:
        columns = [
            Column("name", f"{run.name}, {run.direction}, {run.context:,} tokens", left=True),
            Column("calls", "calls", grouped),
            Column("seconds", "time", lambda value: format_duration(max(value, 1e-9))),
        ]
        rows = [msgspec.to_builtins(part) | {"name": part.name[:60]} for part in run.parts]
        tables.append(Report(SCHEMA, {}, columns, rows))
    return tables


def _missing(profile: Profile) -> list[str]:
    """Return what was not measured, and why; runs without time only by the shortest context of each mixer."""
    too_long: dict[tuple[str | None, str | None], dict[str | None, Missing]] = {}
    lines: list[str] = ["not measured (--time-limit, --memory-limit):"] if profile.missing else []
    for missing in profile.missing:
        if missing.seconds is None:
            lines += wrapped(missing.describe(), "  ")
            continue
        runs = too_long.setdefault((missing.part, missing.direction), {})
        runs[missing.name] = min(runs.get(missing.name, missing), missing, key=lambda run: run.context or 0)
    for (part, direction), runs in too_long.items():
        names = ", ".join(
            f"{name} from {run.context or 0:,} tokens on ({format_duration(run.seconds or 0)} a run)"
            for name, run in runs.items()
        )
        lines += wrapped(f"{part}, {direction}, for want of time: {names}", "  ")
    return lines


def _legend(profile: Profile) -> list[str]:
    return wrapped(
        "The mixer alone, from queries, keys and values to its output. time: the median of the repeats; ±: how far "
        "the 20th or 80th percentile is from it (1 run: there was no time for more). tok/s: tokens of all sequences. "
        "FLOP/s: what the implementation executes, causal pairs only; share: of the FLOP/s of a matrix product here. "
        f"ideal: what recommend predicts, max(FLOPs / peak, bytes / bandwidth), with the peak of {profile.peak_of}; "
        "x: time over ideal. peak: most bytes allocated at once."
    )
