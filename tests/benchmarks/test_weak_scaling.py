"""Weak scaling: the committed plan is what the planner says, and the page and the figure have the committed numbers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from powerplan.plots.figure import figure_bytes  # noqa: E402
from support.scaling import FEW, RANKS, lines, of_line, over_one, planned, scaling_figure  # noqa: E402


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    text = (ROOT / "benchmarks" / "results" / "weak-scaling.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def test_the_committed_plan_is_what_the_planner_says(result: dict[str, Any]) -> None:
    """`python benchmarks/weak_scaling.py --result benchmarks/results/weak-scaling.json --plan --draw ...` renews it."""
    for own, committed in zip(planned(result["tokens"]), result["planned"], strict=True):
        assert own.keys() == committed.keys()
        for key, value in own.items():
            expected = pytest.approx(value) if isinstance(value, float) else value
            assert committed[key] == expected, (own["line"], own["ranks"], key)


def test_time_and_memory_are_flat_with_power_attention_and_time_is_not_with_softmax(result: dict[str, Any]) -> None:
    power, attention = (of_line(result, name) for name in ("power", "attention"))
    assert [row["ranks"] for row in power] == list(RANKS)
    assert max(over_one(power, "seconds").y) < 1.3
    assert max(over_one(power, "tokens_bytes").y) < 1.1
    assert over_one(attention, "seconds").y[-1] > 100
    gathered = of_line(result, "power, gathered")
    assert over_one(gathered, "tokens_bytes").y[-1] > 2 * over_one(power, "tokens_bytes").y[-1]


def test_each_number_of_ranks_is_measured_in_both_ways(result: dict[str, Any]) -> None:
    found = [(row["ranks"], row["exchange"]) for row in result["measured"]]
    assert found == [(1, None), *((ranks, way) for ranks in FEW[1:] for way in ("gather", "scan"))]
    for row in result["measured"]:
        assert len(row["starts"]) == result["runs"]
        assert row["sent_bytes"] == 2 * _messages(row["ranks"], row["exchange"]) * (2 * 2080 * 65 + 2) * 4


def _messages(ranks: int, way: str | None) -> int:
    """Return how many states of [2, 2080, 65] and two decays a layer sends in both passes, on the rank with most."""
    if way == "scan":
        return {2: 1, 3: 4, 4: 5}[ranks]
    return 2 if way else 0


def test_the_figure_has_every_line(result: dict[str, Any]) -> None:
    drawn = figure_bytes(scaling_figure(result), "svg").decode()
    for text in ("8B, softmax attention", "8B, power attention: 1.", "always gathered", "scan: measured", "1,024"):
        assert text in drawn
    committed = (ROOT / "docs" / "images" / "weak-scaling.svg").read_text(encoding="utf-8")
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", committed)
    assert set(labels) == set(re.findall(r"<text[^>]*>([^<]+)</text>", drawn))
    assert len(lines(result["tokens"])) == 5


def page() -> str:
    return (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").partition("## What it costs")[2]


def test_the_page_has_the_planned_numbers(result: dict[str, Any]) -> None:
    power, attention, gathered, small = (
        {row["ranks"]: row for row in of_line(result, name)}
        for name in ("power", "attention", "power, gathered", "small")
    )
    one, two, all_of_them = power[1]["seconds"], power[2], power[1024]
    text = " ".join(page().split())
    assert f"takes {100 * (all_of_them['seconds'] / one - 1):.0f} % longer on 1,024" in text
    assert f"{100 * ((two['seconds'] - two['exposed_exchange_s']) / one - 1):.0f} % are the second state" in text
    assert f"and {100 * all_of_them['exposed_exchange_s'] / one:.0f} % the rounds of scans" in text
    assert f"takes {attention[1024]['seconds'] / attention[1]['seconds']:.0f} times as long" in text
    assert f"a step {gathered[1024]['seconds'] / one:.1f} times as long" in text
    assert f"take {(gathered[1024]['tokens_bytes'] - all_of_them['tokens_bytes']) / 1e9:.0f} GB more" in text
    memory, compute = small[1]["tokens_bytes"] / 2**20, small[2]["seconds"] / small[1]["seconds"]
    assert f"The plan has {memory:.0f} MiB and {compute:.2f} times the compute on two" in text


def test_the_page_has_the_measured_numbers(result: dict[str, Any]) -> None:
    pattern = r"^\| (\d) \| ([\d.]+)(?: / ([\d.]+))? s \| (\d+)(?: / (\d+))? MiB \|$"
    rows = re.findall(pattern, page(), re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(FEW)
    measured = {(row["ranks"], row["exchange"]): row for row in result["measured"]}
    for ranks, gather_s, scan_s, gather_mib, scan_mib in rows:
        ways = {None: (gather_s, gather_mib)} if ranks == "1" else {"gather": (gather_s, gather_mib)}
        ways |= {} if ranks == "1" else {"scan": (scan_s, scan_mib)}
        for way, (seconds, memory) in ways.items():
            row = measured[int(ranks), way]
            assert f"{row['cpu_s']:.2f}" == seconds
            assert f"{row['memory_bytes'] / 2**20:.0f}" == memory
