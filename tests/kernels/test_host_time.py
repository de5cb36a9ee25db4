"""What a call costs the host, as benchmarks/host_time.py counts it: work that a busy machine does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compiler_runs import run

HOST_TIME = Path(__file__).parents[2] / "benchmarks" / "host_time.py"


def rows_of(folder: Path, *settings: str) -> list[dict[str, Any]]:
    """Return the rows of one repeat."""
    result = folder / "host.json"
    done = run(HOST_TIME, "--repeats", 1, "--out", result, *settings)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))["rows"]
    return rows


def test_the_work_of_a_call(tmp_path: Path) -> None:
    """Launches and calls of functions, in Python and C, where no kernel runs: what a busy machine does not change."""
    rows = {(row["engine"], row["name"]): row for row in rows_of(tmp_path)}
    both = "forward and backward"
    # What comes before the first product, the states of chunks, their running sums and the output: 4 forward. Backward
    # dq, dk and dv, and log_g's gradient instead of the output. Hopper's output, dq, dk and dv have 5 launches more.
    assert {rows["plain", name]["launches"] for name in ("forward", "no gradients, gated")} == {4}
    assert [rows["plain", name]["launches"] for name in (both, f"{both}, gated")] == [9, 10]
    assert {rows["hopper", name]["launches"] for name in ("forward", "no gradients, gated")} == {5}
    assert [rows["hopper", name]["launches"] for name in (both, f"{both}, gated")] == [13, 14]
    assert rows["hopper", f"{both}, gated, no normaliser"]["launches"] == 14
    # 135, 343 and 470 when this was written.
    assert rows["plain", "no gradients"]["calls"] < 150
    assert rows["plain", f"{both}, gated"]["calls"] < 380
    assert rows["hopper", f"{both}, gated"]["calls"] < 490


def test_the_work_that_is_left_of_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own C, over a driver that does nothing: maps that are encoded, and functions that are called."""
    monkeypatch.syspath_prepend(HOST_TIME.parent)
    from stub_driver import lacking

    missing = lacking()
    if missing is not None:
        pytest.skip(f"there is not {missing}")
    rows = {(row["engine"], row["name"], row["starts"]): row for row in rows_of(tmp_path, "--launchers")}
    name = "forward and backward, gated"
    for engine, launches, maps in (("hopper", 14, 24), ("plain", 10, 0)):
        kept, wanted = rows[engine, name, "kept"], rows[engine, name, "launchers"]
        assert kept["launches"] == wanted["launches"] == launches
        assert wanted["encoded"] == maps
        assert kept["encoded"] <= maps // 2  # At addresses that have been seen, none.
        assert kept["calls"] < wanted["calls"]
