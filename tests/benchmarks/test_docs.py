"""The table of docs/kernels.md says what the committed result says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
COLUMNS = (
    ("forward", False, "seconds"),
    ("forward", False, "ratio"),
    ("forward", True, "ratio"),
    ("train", False, "seconds"),
    ("train", False, "ratio"),
    ("train", True, "ratio"),
    ("decode", False, "seconds"),
    ("decode", False, "ratio"),
)
UNITS = {"s": 1.0, "ms": 1e-3}


def test_the_table_of_measured_times() -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / "attention-cpu.json").read_text(encoding="utf-8"))
    rows: dict[tuple[str, bool, int], Any] = {
        (row["pass"], row["gated"], row["context"]): row
        for row in data["rows"]
        if row["impl"] == "power-torch" and row["heads"] == 4
    }
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").partition("## Measured")[2]
    lines = [line for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()]
    contexts = []
    for line in lines:
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        context = int(first.replace(",", ""))
        contexts.append(context)
        for (direction, gated, what), cell in zip(COLUMNS, cells, strict=True):
            row = rows.get((direction, gated, context))
            assert bool(cell) == (row is not None), (context, direction)
            if row is None:
                continue
            if what == "ratio":
                assert float(cell) == round(row["over_fastest_sdpa"], 2)
            else:
                number, unit = cell.split()
                value = row["seconds"]["median"] / UNITS[unit]
                assert float(number) == float(f"{value:.3g}"), (context, direction)
    assert contexts == sorted({context for _, _, context in rows})
