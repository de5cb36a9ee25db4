"""Charts: their axes suit any values, and Vega-Lite takes their specs."""

from __future__ import annotations

import json
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.curves import sampled_contexts
from powerplan.units import MAX_CONTEXT
from powerplan.webpage.charts import LABELS, Unit, _powers_of_two, _room, _ticks, curves_chart
from powerplan.webpage.content import Curve, Mark, Point
from powerplan.webpage.page import Page

UNITS: list[Unit] = ["ratio", "bytes", "rate", "seconds"]
values = st.floats(1e-12, 1e18)


@given(low=values, more=st.floats(1, 1e12), unit=st.sampled_from(UNITS), labels=st.integers(0, 4))
def test_axes_have_room_and_a_few_round_ticks(low: float, more: float, unit: Unit, labels: int) -> None:
    if unit == "bytes":
        low *= 1e12  # A state has a byte and more.
    start, stop = _room(low, low * more, labels)
    assert start < low <= low * more < stop
    assert stop / start >= 4
    ticks = _ticks(unit, start, stop)
    assert ticks == sorted(set(ticks))
    assert 1 <= len(ticks) <= 40
    assert all(start <= tick <= stop for tick in ticks)
    if unit == "bytes":
        assert len(ticks) <= 10
        assert all(log2(tick).is_integer() for tick in ticks)


def test_ratios_have_the_same_ticks_on_both_sides() -> None:
    ticks = _ticks("ratio", 0.09, 11)
    assert ticks == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert _ticks("ratio", 1e-6, 1e6) == pytest.approx([10.0**decade for decade in range(-6, 7)])
    assert _ticks("seconds", 1e-3, 1) == pytest.approx([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1])


@given(low=st.integers(1, 2**40), times=st.integers(1, 2**20), most=st.integers(1, 20))
def test_powers_of_two_are_few_and_within(low: int, times: int, most: int) -> None:
    powers = _powers_of_two(low, low * times, most)
    assert len(powers) <= most
    assert all(low <= power <= low * times for power in powers)


@pytest.mark.parametrize("context", [1, 7, 1000, 65_536, MAX_CONTEXT])
def test_contexts_of_curves_are_contexts(context: int) -> None:
    sizes = sampled_contexts([context])
    assert context in sizes
    assert 1 <= sizes[0] <= sizes[-1] <= MAX_CONTEXT


def test_a_chart_holds_its_points_marks_and_texts() -> None:
    points = tuple(Point(x, 1 / x, f"1:{x}") for x in (1024, 4096, 16384))
    curve = Curve("c0", "as it is", "var(--k0)", points)
    other = Curve("c1", "power", "var(--k1)", points[1:], shown=False, dash=(3, 4))
    marks = [Mark(2048, "asked 2k", asked=True), Mark(4096, "balanced 4,096")]
    spec = curves_chart("A chart", [curve, other], ("context", "context"), ("ratio", "ratio"), [Mark(1, "1:1")], marks)
    assert spec["description"] == "A chart"
    assert spec["params"] == [{"name": "shown", "value": ["c0"]}]
    assert len(spec["datasets"]["points"]) == 5
    first, second, last = spec["usermeta"]["tips"]
    assert first == {"x": 1024, "low": 1024.0, "high": 2048.0, "title": "1,024 tokens", "texts": {"c0": "1:1024"}}
    assert second["texts"] == {"c0": "1:4096", "c1": "1:4096"}
    assert (second["high"], last["low"], last["high"]) == (8192.0, 8192.0, 16384.0)
    text = json.dumps(spec)
    assert all(f'"{mark}"' in text for mark in ("1:1", "asked 2k", "balanced 4,096"))


def test_vega_lite_compiles_every_chart(whole: Page, plain: Page) -> None:
    vl_convert = pytest.importorskip("vl_convert")
    for page in (whole, plain):
        for name, spec in page._data()["specs"].items():
            compiled = vl_convert.vegalite_to_vega(spec)
            assert compiled["marks"], name
            assert compiled["description"] == spec["description"]


def test_every_unit_has_labels() -> None:
    assert set(LABELS) == set(Unit.__args__)
