"""The targets of the design on a GPU, each answered from the result file. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

from tabulate import tabulate

Data = Mapping[str, Any]

NOWHERE = float("inf")
"""The crossover where power attention is slower at the longest context."""


@dataclass(frozen=True)
class Target:
    """A figure that is asked for: `value` finds it in the result, None where it was not measured."""

    shape: str
    measure: str
    sign: str
    bound: float
    value: Callable[[Data], float | None]
    digits: int = 2
    unit: str = ""

    def record(self, data: Data) -> dict[str, Any]:
        """Return the target with what was measured."""
        value = self.value(data)
        met = None if value is None else (value <= self.bound if self.sign == "<=" else value >= self.bound)
        fields = {"shape": self.shape, "measure": self.measure, "sign": self.sign, "bound": self.bound}
        # JSON has no infinity: a crossover that is nowhere is missed, without a value.
        return fields | {"unit": self.unit, "value": None if value == NOWHERE else value, "met": met}

    def shown(self, value: float) -> str:
        return f"{value:,.{self.digits}f}{self.unit}"


def power_row(data: Data, cell: str) -> Data | None:
    """Return the row of power attention at a cell, None where it has no time."""
    rows = (row for row in data["rows"] if row["cell"] == cell and row["impl"].startswith("power-"))
    return next((row for row in rows if "seconds" in row), None)


def over_sdpa(cell: str) -> Callable[[Data], float | None]:
    """The fastest SDPA backend's time over power attention's."""

    def value(data: Data) -> float | None:
        row = power_row(data, cell)
        return None if row is None else row.get("over_fastest_sdpa")

    return value


def over_retention(cell: str) -> Callable[[Data], float | None]:
    """The public power kernels' time over power attention's."""

    def value(data: Data) -> float | None:
        row = power_row(data, cell)
        others = [
            other["seconds"]["median"]
            for other in data["rows"]
            if other["cell"] == cell and other["impl"] == "retention" and "seconds" in other
        ]
        return min(others) / row["seconds"]["median"] if row is not None and others else None

    return value


def crossover(head_dim: int) -> Callable[[Data], float | None]:
    """The context from which power attention is faster than every SDPA backend; infinite where it never is."""

    def value(data: Data) -> float | None:
        found = [record for record in data["crossovers"] if record["head_dim"] == head_dim]
        if not found or not found[-1]["contexts"]:
            return None
        context = found[-1]["context"]
        return NOWHERE if context is None else float(context)

    return value


def role_share(cell: str, role: str) -> Callable[[Data], float | None]:
    """A kernel's useful FLOPs per second, as a share of the matrix product's, in percent."""

    def value(data: Data) -> float | None:
        found = [record for record in data["roles"] if (record["cell"], record["role"]) == (cell, role)]
        return 100 * found[-1]["share_of_matmul"] if found else None

    return value


def copy_share(cell: str) -> Callable[[Data], float | None]:
    """The bytes of state over a step's time, as a share of the copy's rate, in percent."""

    def value(data: Data) -> float | None:
        row = power_row(data, cell)
        share = None if row is None else row.get("share_of_copy")
        return None if share is None else 100 * share

    return value


def host_ms(data: Data) -> float | None:
    """The host's time of a training call, in ms."""
    return 1000 * data["host"][-1]["seconds"]["median"] if data["host"] else None


LONG_64, LONG_128 = ("train B1 T64k H8 d64 gated", "train B1 T64k H8 d128 gated")

ROLE_BOUNDS = {"output": 60, "states": 45, "dq": 50, "dk, dv": 50}
"""Percent of the matrix product, by role."""

SDPA_RATIO = "fastest SDPA / power"

TARGETS = (
    Target(LONG_64, SDPA_RATIO, ">=", 9, over_sdpa(LONG_64)),
    Target(LONG_128, SDPA_RATIO, ">=", 3, over_sdpa(LONG_128)),
    Target("forward B8 T64k H12 d64", SDPA_RATIO, ">=", 12, over_sdpa("forward B8 T64k H12 d64")),
    Target("forward B8 T64k H12 d32", SDPA_RATIO, ">=", 20, over_sdpa("forward B8 T64k H12 d32")),
    Target("train B1 H8 d64 gated", "context of the crossover", "<=", 6144, crossover(64), 0),
    Target("train B1 H8 d128 gated", "context of the crossover", "<=", 16384, crossover(128), 0),
    Target("train, tiny", "host time of a call", "<=", 0.4, host_ms, 3, " ms"),
    *(
        Target(f"T64k H8 d{head_dim}", f"{role}: share of matmul", ">=", bound, role_share(cell, role), 0, " %")
        for head_dim, cell in ((64, LONG_64), (128, LONG_128))
        for role, bound in ROLE_BOUNDS.items()
    ),
    Target("decode B64 H16 d64", "share of copy", ">=", 80, copy_share("decode B64 H16 d64"), 0, " %"),
    Target("decode B16 H16 d128", "share of copy", ">=", 80, copy_share("decode B16 H16 d128"), 0, " %"),
    Target(LONG_64, "retention / power", ">=", 2.5, over_retention(LONG_64)),
)


def find_crossover(ratios: Mapping[int, float]) -> tuple[int | None, int | None, int | None]:
    """Return the context where the ratio passes 1 for good, and the measured contexts on either side of it.

    ratios: SDPA's time over power attention's, by context. Between two contexts the logarithm of the ratio is a line in
    that of the context. The context is the shortest measured where the ratio is above 1 everywhere, and None where it
    is below 1 at the longest.
    """
    slower_at = max((context for context, ratio in ratios.items() if ratio < 1), default=None)
    faster_at = min((context for context in ratios if slower_at is None or context > slower_at), default=None)
    if slower_at is None or faster_at is None:
        return faster_at, slower_at, faster_at
    low, high = log(ratios[slower_at]), log(ratios[faster_at])
    share = low / (low - high)
    return round(exp(log(slower_at) + share * log(faster_at / slower_at))), slower_at, faster_at


def crossover_record(rows: Sequence[Data], head_dim: int, cells: Mapping[str, int]) -> dict[str, Any]:
    """Return where power attention overtakes the fastest SDPA in `cells` (context by name), as measured so far."""
    ratios = {
        cells[row["cell"]]: row["over_fastest_sdpa"]
        for row in rows
        if row["cell"] in cells and row["impl"].startswith("power-") and row.get("over_fastest_sdpa")
    }
    context, slower_at, faster_at = find_crossover(ratios)
    place = {"context": context, "slower_at": slower_at, "faster_at": faster_at}
    return {"head_dim": head_dim, **place, "contexts": dict(sorted(ratios.items()))}


def table(data: Data) -> str:
    """Return the targets as a table, with the device, the versions and the date below."""
    lines = []
    for target, record in zip(TARGETS, data["targets"], strict=True):
        value, bound, met = record["value"], target.bound, record["met"]
        found = "not measured" if met is None else "nowhere" if value is None else target.shown(value)
        share = "" if value is None else f"{value / bound:.2f}"
        word = {True: "met", False: "missed", None: ""}[met]
        lines.append([target.shape, target.measure, f"{target.sign} {target.shown(bound)}", found, share, word])
    headers = ["shape", "measure", "target", "measured", "measured / target", ""]
    shown = tabulate(lines, headers=headers, disable_numparse=True)
    versions = ", ".join(f"{name} {number}" for name, number in (data.get("versions") or {}).items() if number)
    return f"{shown}\n{data.get('device', 'no device')}; {versions}; {data.get('date', 'no date')}"


def records(data: Data) -> list[dict[str, Any]]:
    """Return all targets with what was measured, for the result file."""
    return [target.record(data) for target in TARGETS]
