"""`powerplan profile`: what overtakes what, the mixers alone, then the layer's time between weights and state."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import msgspec

from powerplan.measured import SCHEMA
from powerplan.profile.result import PASSES, Crossover, Measurement, Missing, Profile, Split
from powerplan.report.render import Column, Report, grouped, table_of
from powerplan.units import format_bytes, format_count, format_duration, format_ratio

WIDTH = 98
SHORT = {"forward": "fwd", "forward+backward": "train", "decode": "decode"}


def profile_report(profile: Profile, everything: bool = False, tablefmt: str = "simple") -> Report:
    """Return the report of a profile; `everything` puts all rows in the table, not only those of the mixers alone.

    tablefmt: of the tables that follow the report's own, "pipe" for markdown.
    """
    rows = sorted(
        profile.results if everything else profile.part("state"),
        key=lambda row: (list(PASSES.values()).index(row.direction), row.context),
    )
    payload = msgspec.to_builtins(profile)
    before = [*_head(profile), *_overtaking(profile)]
    after = [
        *_layers(profile, tablefmt),
        *_sweeps(profile),
        *_breakdowns(profile, tablefmt),
        *_missing(profile),
        *_legend(profile),
    ]
    if not after[0]:
        del after[0]  # The table ends with a line of its own.
    columns = _EVERY if everything else _COLUMNS
    return Report(SCHEMA, payload, columns, [_entry(row) for row in rows], before=before, after=after)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * min(len(head), 4), break_long_words=False
    )


def _head(profile: Profile) -> list[str]:
    layer = profile.layer
    first = next(iter(profile.part("state") or profile.results))
    groups = "" if first.heads == first.kv_heads else f" ({first.kv_heads} kv)"
    parts = [
        f"{first.heads}{groups} heads of {first.head_dim}",
        f"hidden size {layer.hidden_size:,}",
        *([layer.ffn] if layer.ffn else []),
        profile.dtype,
        f"batch {profile.batch}",
    ]
    threads = f" ({profile.threads} threads)" if profile.threads else ""
    rates = f"matrix product {_unit(profile.matmul_flops_per_s)}FLOP/s, copy {_unit(profile.copy_bytes_per_s)}B/s"
    lines = _wrapped(f"{layer.model}, {layer.positions}: ", ", ".join(parts))
    lines += _wrapped("", f"on {profile.device}{threads}, torch {profile.torch}, {profile.date}: {rates}")
    if profile.checks:
        worst = max(check.share_of_budget for check in profile.checks)
        names = dict.fromkeys(
            f"{check.name} ({check.impl})" for check in profile.checks if not check.name.startswith("layer with ")
        )
        names |= dict.fromkeys(f"{check.name.removeprefix('layer with ')} ({check.impl})" for check in profile.checks)
        text = f"{', '.join(names)}: largest error {worst:.0%} of what is allowed"
        lines += _wrapped("checked against float64: ", text)
    if profile.interrupted:
        lines.append("interrupted: what was measured until then")
    return lines


def _unit(rate: float) -> str:
    """Return a rate with three figures and its prefix apart, "96.6 G"."""
    text = _rate(rate)
    return f"{text[:-1]} {text[-1]}" if text[-1].isalpha() else f"{text} "


def _overtaking(profile: Profile) -> list[str]:
    lines = [line for item in profile.crossover for line in _wrapped("", _crossing(item))]
    return ["", *lines] if lines else []


def _crossing(item: Crossover) -> str:
    what, rival = item.name, item.against
    if item.context is not None:
        assert item.slower_at is not None
        assert item.faster_at is not None
        return (
            f"{item.direction}: {what} overtakes {rival} at about {_near(item.context):,} tokens "
            f"(slower at {item.slower_at:,}, faster at {item.faster_at:,})"
        )
    if item.slower_at is None:
        return f"{item.direction}: {what} is faster than {rival} at {item.faster_at:,} tokens already, and beyond"
    guess = (
        f", where time or memory ended the search; it would be at about {_near(item.estimate):,}"
        if item.estimate
        else ""
    )
    return f"{item.direction}: {what} does not overtake {rival} up to {item.slower_at:,} tokens{guess}"


def _near(tokens: int) -> int:
    """Return a context with the two figures that a crossover is known to."""
    return int(float(f"{tokens:.2g}"))


def _milliseconds(value: Any) -> str:
    return "" if value is None else format_duration(value / 1000)


def _entry(row: Measurement) -> dict[str, Any]:
    entry: dict[str, Any] = msgspec.to_builtins(row)
    flops_per_s = None if row.tflops is None else row.tflops * 1e12
    return entry | {"flops_per_s": flops_per_s, "over_predicted": row.over_predicted, "spread": _spread(row)}


def _spread(row: Measurement) -> str:
    """Return how far the 20th and the 80th percentile are from the median at most; nothing for one run."""
    if row.ms_p20 is None or row.ms_p80 is None or row.repeats < 2:
        return ""
    share = max(row.ms_p50 - row.ms_p20, row.ms_p80 - row.ms_p50) / row.ms_p50
    return f"{share:.0%}" if share < 1 else ">99%"


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.0%}"


def _three(value: float) -> float:
    return float(f"{value:.3g}")


def _two(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{round(value):,}"


def _rate(value: Any) -> str:
    return "" if value is None else format_count(Fraction(_three(value)))


def _bytes(value: Any) -> str:
    """Return bytes with three figures."""
    if value is None:
        return ""
    number, unit = format_bytes(value).split(" ")
    return f"{_three(float(number.replace(',', ''))):g} {unit}"


_COLUMNS = [
    Column("pass", "pass", lambda value: SHORT[value], left=True),
    Column("context", "context", grouped),
    Column("name", "mixer", left=True),
    Column("ms_p50", "time", _milliseconds),
    Column("spread", "±"),
    Column("tokens_per_s", "tok/s", _rate),
    Column("flops_per_s", "FLOP/s", _rate),
    Column("share_of_matmul", "share", _share),
    Column("predicted_ms", "ideal", _milliseconds),
    Column("over_predicted", "x", lambda value: "" if value is None else f"{_two(value)}x"),
    Column("peak_bytes", "peak", _bytes),
]

_EVERY = [
    Column(key, key)
    for key in (
        *("part", "name", "impl", "pass", "context", "ms_p20", "ms_p50", "ms_p80", "repeats", "tokens_per_s", "tflops"),
        *("share_of_matmul", "predicted_ms", "peak_bytes", "mixer", "heads", "kv_heads", "head_dim", "p", "window"),
        *("chunk_size", "gated", "batch", "dtype"),
    )
]

_LAYER = [
    Column("pass", "pass", lambda value: SHORT[value], left=True),
    Column("context", "context", grouped),
    Column("name", "mixer", left=True),
    Column("projections_ms", "projections", _milliseconds),
    Column("ffn_ms", "FFN", _milliseconds),
    Column("state_ms", "state", _milliseconds),
    Column("layer_ms", "layer, as\na whole", _milliseconds),
    Column("wsfr_time", "WSFR\nin time", lambda value: format_ratio(Fraction(value))),
    Column("wsfr_flops", "WSFR\nin FLOPs", lambda value: format_ratio(Fraction(value))),
]


def _layers(profile: Profile, tablefmt: str) -> list[str]:
    order = list(PASSES.values())
    rows: Sequence[Split] = sorted(profile.split, key=lambda row: (order.index(row.direction), row.context))
    return table_of(_LAYER, [msgspec.to_builtins(row) for row in rows], tablefmt).split("\n") if rows else []


def _sweeps(profile: Profile) -> list[str]:
    """Return the fastest chunk size of each pass and place where several were timed."""
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
            # The first is the one that was asked for; those in other chunks came after it.
            name = rows[0].name.partition(" chunk ")[0]
            text = f"{best:,} tokens is the fastest chunk of {name} at {context:,} tokens; {others} its time"
            lines += _wrapped(f"{direction}: ", text)
    return ["", *lines] if lines else []


def _breakdowns(profile: Profile, tablefmt: str) -> list[str]:
    lines: list[str] = []
    for item in profile.breakdown:
        columns = [
            Column("name", f"{item.name}, {item.direction}, {item.context:,} tokens", left=True),
            Column("calls", "calls", grouped),
            Column("seconds", "time", lambda value: format_duration(max(value, 1e-9))),
        ]
        rows = [{"name": part.name[:60], "calls": part.calls, "seconds": part.seconds} for part in item.parts]
        lines += ["", *table_of(columns, rows, tablefmt).split("\n")]
    return lines


def _missing(profile: Profile) -> list[str]:
    """Return what was not measured: for each part and pass, from which context on for want of time, else why."""
    timed: dict[tuple[str | None, str | None], dict[str | None, Missing]] = {}
    lines: list[str] = []
    for item in profile.missing:
        if item.seconds is not None:
            runs = timed.setdefault((item.part, item.direction), {})
            if item.name not in runs or (item.context or 0) < (runs[item.name].context or 0):
                runs[item.name] = item
            continue
        lines += _wrapped("  ", item.describe())
    for (part, direction), runs in timed.items():
        names = ", ".join(
            f"{name} from {run.context or 0:,} tokens on ({format_duration(run.seconds or 0)} a run)"
            for name, run in runs.items()
        )
        lines += _wrapped("  ", f"{part}, {direction}, for want of time: {names}")
    return ["", "not measured (--time-limit, --memory-limit):", *lines] if lines else []


def _legend(profile: Profile) -> list[str]:
    text = (
        "mixer: queries, keys and values in, output out. time: median; ±: the 20th and 80th percentile. FLOP/s: "
        "causal pairs, chunks as executed; share: of the matrix product. ideal: predicted, max(FLOPs / peak, bytes / "
        f"bandwidth) with the FLOPs that recommend counts and the peak of {profile.peak_of}; x: time over it. peak: "
        "bytes allocated at once. WSFR: projections and FFN, timed apart, over the mixer."
    )
    return ["", *_wrapped("", text)]
