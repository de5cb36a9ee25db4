"""One measured (or skipped) variant at one shape, and the comparisons between rows of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from powerplan.profile.result import OperationTime
from powerplan.profile.timing import Spread
from support.checks import Checked
from support.presets import Target
from support.shapes import Shape, Variant, decode_bytes, flops


@dataclass(frozen=True)
class Row:
    """What was found: a time, or why there is none. over_fastest_sdpa is SDPA's time over this one's."""

    shape: Shape
    variant: Variant
    time: Spread | None = None
    skipped: str | None = None
    checked: Checked | None = None
    peak_bytes: int | None = None
    over_fastest_sdpa: float | None = None
    parts: tuple[OperationTime, ...] = ()

    def as_json(self, matmul_rate: float, copy_rate: float) -> dict[str, Any]:
        """Return a flat record; rates are FLOP/s and bytes/s of the machine."""
        record: dict[str, Any] = {"pass": self.shape.kind, "context": self.shape.tokens}
        record |= {name: value for name, value in asdict(self.shape).items() if name not in ("kind", "tokens")}
        record |= {key: value for key, value in asdict(self.variant).items() if value is not None}
        if self.skipped is not None:
            return record | {"skipped": self.skipped}
        assert self.time is not None
        count = flops(self.shape, self.variant)
        record |= {
            "seconds": asdict(self.time),
            "flops": count,
            "tflops_per_s": count / self.time.median / 1e12,
            "share_of_matmul": count / self.time.median / matmul_rate,
            "over_fastest_sdpa": self.over_fastest_sdpa,
            "peak_bytes_beyond_inputs_and_outputs": self.peak_bytes,
            "checked": None if self.checked is None else asdict(self.checked),
        }
        if self.shape.kind == "decode":
            record["bytes"] = decode_bytes(self.shape, self.variant)
            record["share_of_copy"] = share_of_copy(self, copy_rate)
        if self.parts:
            record["breakdown"] = [msgspec.structs.asdict(part) for part in self.parts]
        return record


def share_of_copy(row: Row, copy_rate: float) -> float | None:
    """Return the bandwidth of a decoding step as a share of a copy's."""
    if row.time is None:
        return None
    return decode_bytes(row.shape, row.variant) / row.time.median / copy_rate


def with_ratios(rows: list[Row]) -> list[Row]:
    """Return the rows, each with the time of its shape's fastest SDPA backend over its own."""
    fastest: dict[Shape, float] = {}
    for row in rows:
        if row.time is not None and row.variant.impl.startswith("sdpa-"):
            fastest[row.shape] = min(row.time.median, fastest.get(row.shape, row.time.median))
    return [
        row
        if row.time is None or row.shape not in fastest
        else replace(row, over_fastest_sdpa=fastest[row.shape] / row.time.median)
        for row in rows
    ]


def answer(target: Target, rows: Iterable[Row], copy_rate: float) -> float | None:
    """Return the figure that `target` asks for, None where its rows were not measured."""
    rows = [row for row in rows if row.time is not None]
    asked = [row for row in rows if _is_asked(target, row)]
    row = next((row for row in asked if row.shape.tokens == target.tokens), None)
    if row is None or row.time is None:
        return None
    if target.metric == "over_sdpa":
        return row.over_fastest_sdpa
    if target.metric == "over_retention":
        times = [other.time.median for other in rows if _is_rival(row, other) and other.time is not None]
        return min(times) / row.time.median if times else None
    if target.metric == "memory":
        return row.peak_bytes
    if target.metric == "bandwidth":
        return share_of_copy(row, copy_rate)
    assert target.metric == "flat", target.metric
    shortest = min(asked, key=lambda other: other.shape.tokens)
    if shortest.time is None or shortest is row:
        return None
    return row.time.median / shortest.time.median


def _is_asked(target: Target, row: Row) -> bool:
    shape, variant = row.shape, row.variant
    return (
        (shape.kind, shape.heads, shape.head_dim) == (target.kind, target.heads, target.head_dim)
        and variant.impl == target.impl
        and bool(variant.gated) == target.gated
    )


def _is_rival(row: Row, other: Row) -> bool:
    return other.variant.impl == "retention" and other.shape == row.shape and other.variant.gated == row.variant.gated
