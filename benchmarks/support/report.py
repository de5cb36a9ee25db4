"""The table that a person reads, and the JSON file that docs quote."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tabulate import tabulate

from powerplan.version import __version__
from support.presets import Target
from support.rows import Row, answer, share_of_copy
from support.shapes import Shape

SCHEMA = "powerplan.attention-benchmark/1"


@dataclass(frozen=True)
class Machine:
    """The device, and the rates measured on it in the same run: a matrix product and a copy."""

    device: str
    matmul_flops_per_s: float
    copy_bytes_per_s: float
    threads: int | None


def device_name(device: str) -> str:
    """Return what the benchmark ran on."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def result(
    arguments: dict[str, Any], machine: Machine, rows: list[Row], targets: tuple[Target, ...], seconds: float
) -> dict[str, Any]:
    """Return the whole result as JSON data."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {"powerplan": __version__}
        | {name: _version(name) for name in ("torch", "triton", "retention", "fla-core")},
        "machine": asdict(machine),
        "arguments": arguments,
        "seconds": round(seconds, 1),
        "targets": [_target_record(target, rows, machine) for target in targets],
        "rows": [row.as_json(machine.matmul_flops_per_s, machine.copy_bytes_per_s) for row in rows],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def format_seconds(value: float, like: float | None = None) -> str:
    """Return a time with three digits, 1.23 s, 45.6 ms, 789 us; in the unit of `like`, which is left out, if given."""
    units = ((1, "s"), (1e3, "ms"), (1e6, "us"))
    scale = value if like is None else like
    factor, unit = next((pair for pair in units if scale * pair[0] >= 1), units[-1])
    number = value * factor
    digits = f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"
    return digits if like is not None else f"{digits} {unit}"


def tables(rows: Iterable[Row], machine: Machine) -> str:
    """Return one table for each pass and size of heads, then what was not measured and why."""
    rows = list(rows)
    blocks = []
    for place in dict.fromkeys(replace(row.shape, tokens=0) for row in rows):
        measured = [row for row in rows if replace(row.shape, tokens=0) == place and row.time is not None]
        title = f"{place.kind}: batch {place.batch}, {_heads(place)} of {place.head_dim}, {place.dtype}"
        if measured:
            lines = [_line(row, machine) for row in measured]
            align = ["right", "left", *["right"] * (len(lines[0]) - 2)]
            table = tabulate(lines, headers=_headers(place.kind), disable_numparse=True, colalign=align)
            blocks.append(f"{title}\n{table}")
    skipped: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        if row.skipped is not None:
            found = skipped.setdefault(f"{row.variant}: {row.skipped}", {}).setdefault(row.shape.kind, [])
            found.append(row.shape.tokens)
    if skipped:
        lines_of = (f"  {name} ({_places(found, rows)})" for name, found in skipped.items())
        blocks.append("not measured\n" + "\n".join(lines_of))
    return "\n\n".join(blocks)


def _heads(shape: Shape) -> str:
    shared = "" if shape.heads == shape.kv_heads else f" ({shape.kv_heads} key/value)"
    return f"{shape.heads} heads{shared}"


def _places(found: dict[str, list[int]], rows: list[Row]) -> str:
    """Return passes with their contexts, which are left out where they are all of them."""
    words = []
    for kind, contexts in found.items():
        every = {row.shape.tokens for row in rows if row.shape.kind == kind} == set(contexts)
        words.append(kind if every else f"{kind} at {', '.join(f'{tokens:,}' for tokens in dict.fromkeys(contexts))}")
    return "; ".join(words)


def _headers(kind: str) -> list[str]:
    last = ["GB/s", "of copy"] if kind == "decode" else ["TFLOP/s", "of matmul", "peak MB"]
    return ["context", "implementation", "median", "p20 - p80", "n", "SDPA / this", *last]


def _line(row: Row, machine: Machine) -> list[str]:
    assert row.time is not None
    record = row.as_json(machine.matmul_flops_per_s, machine.copy_bytes_per_s)
    low, high = (format_seconds(value, like=row.time.median) for value in (row.time.p20, row.time.p80))
    line = [
        f"{row.shape.tokens:,}",
        str(row.variant),
        format_seconds(row.time.median),
        f"{low} - {high}",
        str(row.time.repeats),
        "" if row.over_fastest_sdpa is None else f"{row.over_fastest_sdpa:.2f}",
    ]
    if row.shape.kind == "decode":
        share = share_of_copy(row, machine.copy_bytes_per_s) or 0
        return [*line, f"{record['bytes'] / row.time.median / 1e9:.1f}", f"{share:.0%}"]
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
    return [*line, f"{record['tflops_per_s']:.3g}", f"{record['share_of_matmul']:.0%}", peak]


def breakdown_tables(rows: Iterable[Row]) -> str:
    """Return where the time of each profiled row went."""
    blocks = []
    for row in rows:
        if row.parts:
            title = f"{row.variant}, {row.shape.kind}, {row.shape.tokens:,} tokens, d{row.shape.head_dim}"
            lines = [[part.name[:70], part.calls, format_seconds(part.seconds)] for part in row.parts]
            blocks.append(f"{title}\n" + tabulate(lines, headers=["part", "calls", "time"], disable_numparse=True))
    return "\n\n".join(blocks)


def _target_record(target: Target, rows: list[Row], machine: Machine) -> dict[str, Any]:
    value = answer(target, rows, machine.copy_bytes_per_s)
    met = None if value is None else (value <= target.bound if target.at_most else value >= target.bound)
    return asdict(target) | {"value": value, "met": met}


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value / 1e6:.0f} MB" if metric == "memory" else f"{value:.2f}"


def target_table(records: Iterable[dict[str, Any]]) -> str:
    """Return each target with what was measured and whether it is met."""
    lines = []
    for record in records:
        sign = "<=" if record["at_most"] else ">="
        found, bound = (_shown(record["metric"], record[name]) for name in ("value", "bound"))
        word = {True: "met", False: "missed", None: ""}[record["met"]]
        place = f"{record['kind']} {record['tokens']:,} H{record['heads']} d{record['head_dim']}"
        lines.append([place, record["metric"], f"{sign} {bound}", found, word])
    return tabulate(lines, headers=["target", "metric", "asked", "measured", ""], disable_numparse=True)
