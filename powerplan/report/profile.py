"""`powerplan profile`: the crossovers, a table of the mixers alone, and how the layer's time splits."""

from __future__ import annotations

import textwrap
from fractions import Fraction
from typing import Any

import msgspec

from powerplan.measured import SCHEMA
from powerplan.profile.result import PASSES, Crossover, Measurement, Missing, Profile, Split
from powerplan.report.render import Column, Report, grouped, table_of
from powerplan.units import format_bytes, format_count, format_duration, format_ratio

LINE_WIDTH = 98
"""Characters in a line of text around the tables."""

DIRECTIONS = list(PASSES.values())
"""Passes as a saved profile names them, in the order of the tables."""

SHORT_DIRECTIONS = {"forward": "fwd", "forward+backward": "train", "decode": "decode"}
"""Passes as the tables name them."""


def profile_report(profile: Profile, all_parts: bool = False, tablefmt: str = "simple") -> Report:
    """Return the report of a profile, for `render`.

    all_parts: put all timings in the table, not only those of the mixers alone. tablefmt: the format of the further
    tables, "pipe" for markdown.
    """
    rows = sorted(profile.results if all_parts else profile.part("state"), key=_in_order)
    before = [*_head(profile), *_crossovers(profile)]
    after = [
        *_splits(profile, tablefmt),
        *_chunk_sizes(profile),
        *_breakdowns(profile, tablefmt),
        *_missing(profile),
        *_legend(profile),
    ]
    if not after[0]:
        del after[0]  # `render` puts an empty line after the first table.
    columns = _CSV_COLUMNS if all_parts else _COLUMNS
    payload = msgspec.to_builtins(profile)
    return Report(SCHEMA, payload, columns, [_table_row(row) for row in rows], before=before, after=after)


def _in_order(row: Measurement | Split) -> tuple[int, int]:
    return DIRECTIONS.index(row.direction), row.context


def _wrapped(start: str, text: str) -> list[str]:
    """Return `text` in lines, the first after `start`, the others indented by as much, up to 4 characters."""
    indent = " " * min(len(start), 4)
    return textwrap.wrap(text, LINE_WIDTH, initial_indent=start, subsequent_indent=indent, break_long_words=False)


def _head(profile: Profile) -> list[str]:
    """Return the layer, the machine, and the largest error of the checks."""
    layer = profile.layer
    first = next(iter(profile.part("state") or profile.results))
    kv_heads = "" if first.heads == first.kv_heads else f" ({first.kv_heads} kv)"
    sizes = [
        f"{first.heads}{kv_heads} heads of {first.head_dim}",
        f"hidden size {layer.hidden_size:,}",
        *([layer.ffn] if layer.ffn else []),
        profile.dtype,
        f"batch {profile.batch}",
    ]
    threads = f" ({profile.threads} threads)" if profile.threads else ""
    product, copy = _spaced(profile.matmul_flops_per_s), _spaced(profile.copy_bytes_per_s)
    rates = f"matrix product {product}FLOP/s, copy {copy}B/s"
    lines = _wrapped(f"{layer.model}, {layer.positions}: ", ", ".join(sizes))
    lines += _wrapped("", f"on {profile.device}{threads}, torch {profile.torch}, {profile.date}: {rates}")
    if profile.checks:
        worst = max(check.share_of_budget for check in profile.checks)
        # Kernels first; softmax attention is checked in a layer only.
        checks = sorted(profile.checks, key=lambda check: check.name.startswith("layer with "))
        names = dict.fromkeys(f"{check.name.removeprefix('layer with ')} ({check.impl})" for check in checks)
        text = f"{', '.join(names)}: largest error {worst:.0%} of what is allowed"
        lines += _wrapped("checked against float64: ", text)
    if profile.interrupted:
        lines.append("interrupted: what was measured until then")
    return lines


def _crossovers(profile: Profile) -> list[str]:
    lines = [line for crossover in profile.crossover for line in _wrapped("", _crossover(crossover))]
    return ["", *lines] if lines else []


def _crossover(crossover: Crossover) -> str:
    """Return one crossover in a sentence, with its context in two figures."""
    what, slower_at, faster_at = f"{crossover.direction}: {crossover.name}", crossover.slower_at, crossover.faster_at
    if crossover.context is not None:
        about = f"{_figures(crossover.context, 2):,.0f} tokens"
        between = f"(slower at {slower_at:,}, faster at {faster_at:,})"
        return f"{what} overtakes {crossover.against} at about {about} {between}"
    if slower_at is None:
        return f"{what} is faster than {crossover.against} at {faster_at:,} tokens already, and beyond"
    text = f"{what} does not overtake {crossover.against} up to {slower_at:,} tokens"
    if not crossover.estimate:
        return text
    about = f"{_figures(crossover.estimate, 2):,.0f}"
    return f"{text}, where time or memory ended the search; it would be at about {about}"


def _milliseconds(value: Any) -> str:
    return "" if value is None else format_duration(value / 1000)


def _table_row(row: Measurement) -> dict[str, Any]:
    raw: dict[str, Any] = msgspec.to_builtins(row)
    flops_per_s = None if row.tflops is None else row.tflops * 1e12
    return raw | {"flops_per_s": flops_per_s, "over_predicted": row.over_predicted, "spread": _spread(row)}


def _spread(row: Measurement) -> str:
    """Return how far the 20th or 80th percentile is from the median, whichever is farther; nothing for one run."""
    if row.ms_p20 is None or row.ms_p80 is None or row.repeats < 2:
        return ""
    share = max(row.ms_p50 - row.ms_p20, row.ms_p80 - row.ms_p50) / row.ms_p50
    return f"{share:.0%}" if share < 1 else ">99%"


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.0%}"


def _times(value: Any) -> str:
    """Return a factor with two figures, "1.7x"."""
    if value is None:
        return ""
    return f"{value:.2g}x" if value < 100 else f"{round(value):,}x"


def _figures(value: float, figures: int) -> float:
    """Return a number rounded to so many figures."""
    return float(f"{value:.{figures}g}")


def _rate(value: Any) -> str:
    """Return a rate with three figures, "96.6G"."""
    return "" if value is None else format_count(Fraction(_figures(value, 3)))


def _spaced(rate: float) -> str:
    """Return a rate with three figures, ready for its unit: "96.6 G"."""
    text = _rate(rate)
    return f"{text[:-1]} {text[-1]}" if text[-1].isalpha() else f"{text} "


def _bytes(value: Any) -> str:
    """Return bytes with three figures, "23.2 MiB"."""
    if value is None:
        return ""
    number, unit = format_bytes(value).split(" ")
    return f"{_figures(float(number.replace(',', '')), 3):g} {unit}"


_KEY_COLUMNS = [
    Column("pass", "pass", lambda value: SHORT_DIRECTIONS[value], left=True),
    Column("context", "context", grouped),
    Column("name", "mixer", left=True),
]

_COLUMNS = [
    *_KEY_COLUMNS,
    Column("ms_p50", "time", _milliseconds),
    Column("spread", "±"),
    Column("tokens_per_s", "tok/s", _rate),
    Column("flops_per_s", "FLOP/s", _rate),
    Column("share_of_matmul", "share", _share),
    Column("predicted_ms", "ideal", _milliseconds),
    Column("over_predicted", "x", _times),
    Column("peak_bytes", "peak", _bytes),
]

_CSV_COLUMNS = [
    Column(key, key)
    for key in (
        *("part", "name", "impl", "pass", "context", "ms_p20", "ms_p50", "ms_p80", "repeats", "tokens_per_s", "tflops"),
        *("share_of_matmul", "predicted_ms", "peak_bytes", "mixer", "heads", "kv_heads", "head_dim", "p", "window"),
        *("chunk_size", "gated", "batch", "dtype"),
    )
]

_SPLIT_COLUMNS = [
    *_KEY_COLUMNS,
    Column("projections_ms", "projections", _milliseconds),
    Column("ffn_ms", "FFN", _milliseconds),
    Column("state_ms", "state", _milliseconds),
    Column("layer_ms", "layer, as\na whole", _milliseconds),
    Column("wsfr_time", "WSFR\nin time", lambda value: format_ratio(Fraction(value))),
    Column("wsfr_flops", "WSFR\nin FLOPs", lambda value: format_ratio(Fraction(value))),
]


def _splits(profile: Profile, tablefmt: str) -> list[str]:
    rows = [msgspec.to_builtins(row) for row in sorted(profile.split, key=_in_order)]
    return table_of(_SPLIT_COLUMNS, rows, tablefmt).split("\n") if rows else []


def _chunk_sizes(profile: Profile) -> list[str]:
    """Return the fastest chunk size of each mixer, pass and context for which several were timed."""
    lines = []
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for row in profile.part("state"):
        if row.chunk_size:
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
            lines += _wrapped(f"{direction}: ", text)
    return ["", *lines] if lines else []


def _breakdowns(profile: Profile, tablefmt: str) -> list[str]:
    lines: list[str] = []
    for run in profile.breakdown:
        columns = [
            Column("name", f"{run.name}, {run.direction}, {run.context:,} tokens", left=True),
            Column("calls", "calls", grouped),
            Column("seconds", "time", lambda value: format_duration(max(value, 1e-9))),
        ]
        rows = [{"name": part.name[:60], "calls": part.calls, "seconds": part.seconds} for part in run.parts]
        lines += ["", *table_of(columns, rows, tablefmt).split("\n")]
    return lines


def _missing(profile: Profile) -> list[str]:
    """Return what was not measured, and why; runs without time only by the shortest context of each mixer."""
    too_long: dict[tuple[str | None, str | None], dict[str | None, Missing]] = {}
    lines: list[str] = []
    for missing in profile.missing:
        if missing.seconds is None:
            lines += _wrapped("  ", missing.describe())
            continue
        runs = too_long.setdefault((missing.part, missing.direction), {})
        shortest = runs.setdefault(missing.name, missing)
        if (missing.context or 0) < (shortest.context or 0):
            runs[missing.name] = missing
    for (part, direction), runs in too_long.items():
        names = ", ".join(
            f"{name} from {run.context or 0:,} tokens on ({format_duration(run.seconds or 0)} a run)"
            for name, run in runs.items()
        )
        lines += _wrapped("  ", f"{part}, {direction}, for want of time: {names}")
    return ["", "not measured (--time-limit, --memory-limit):", *lines] if lines else []


def _legend(profile: Profile) -> list[str]:
    text = (
        "The first table times the mixer alone, from queries, keys and values to its output. time: median of the "
        "repeats. ±: how far the 20th or 80th percentile is from it. FLOP/s: what the implementation executes, causal "
        "pairs only. share: of the matrix product's FLOP/s. ideal: what recommend predicts, max(FLOPs / peak, bytes / "
        f"bandwidth), with the peak of {profile.peak_of}. x: time / ideal. peak: most bytes allocated at once. WSFR in "
        "time: projections and FFN, timed on their own, over state."
    )
    return ["", *_wrapped("", text)]
