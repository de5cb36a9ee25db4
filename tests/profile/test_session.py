"""The order and the clocks of a session, without the seconds that whole profiles take."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch

from powerplan.hardware import Peak
from powerplan.load import catalogue_spec
from powerplan.profile import machine, runner, session, timing
from powerplan.profile.machine import Machine
from powerplan.profile.options import workload_of
from powerplan.profile.runner import Runner
from powerplan.profile.scheduler import Scheduler, TimeLimit
from powerplan.profile.session import Session
from powerplan.profile.timing import Run, cpu_clock
from powerplan.profile.workload import Point, TimedMixer, Workload

SLOW_PEAK = Peak("a slow one", Fraction(10**9), Fraction(10**12), "test")
SLOW = Machine("cpu", "a slow one", cpu_clock, 1e9, 1e12, SLOW_PEAK, 1)
"""A machine whose rates are known: 1 GFLOP/s, and more bandwidth than anything needs."""

HOUR = 3600.0
"""A time limit that no test comes near."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Workload:
    """Return a workload of all passes that a session runs in no time: on a known machine, without checks."""
    monkeypatch.setattr(session, "examine", lambda device, dtype: SLOW)
    monkeypatch.setattr(session, "check_all", lambda *_: None)
    passes = ("forward", "train", "decode")
    return workload_of(catalogue_spec("gpt2-small"), against="none", passes=passes, contexts=[64, 128])


def test_decoding_comes_before_what_may_take_all_the_time(small: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[Point] = []

    def nothing(workload: Workload, timed: TimedMixer, point: Point) -> Run:
        points.append(point)
        return lambda: None

    monkeypatch.setattr(runner, "prepare", nothing)
    Session(small, HOUR).run()
    order = [(point.pass_name, point.context) for point in points if point.part == "state"]
    assert order[:4] == [("decode", 64), ("decode", 128), ("forward", 64), ("train", 64)]


def test_decoding_steps_find_cold_caches_on_a_processor(small: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of one layer, over and over, would find its state in the cache: a model's step never does."""
    flushes, runs, now = [0], [], [""]

    def clock() -> timing.Clock:
        def flushed(run: Run) -> float:
            flushes[0] += 1
            now[0] = "cold"
            seconds = cpu_clock(run)
            now[0] = ""
            return seconds

        return flushed

    def noted(workload: Workload, timed: TimedMixer, point: Point) -> Run:
        return lambda: runs.append((point.pass_name, now[0]))

    monkeypatch.setattr(session, "cold_cpu_clock", clock)
    monkeypatch.setattr(runner, "prepare", noted)
    Session(small, HOUR).run()
    assert flushes[0] > 0
    assert set(runs) == {("decode", "cold"), ("forward", ""), ("train", "")}
    flushes[0] = 0
    Session(replace(small, passes=("forward",)), HOUR).run()
    assert flushes[0] == 0


def test_the_cold_clock_fills_caches_outside_the_time() -> None:
    clock, order = timing.cold_cpu_clock(), []
    zero = torch.Tensor.zero_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "zero_", lambda x: order.append(x.numel() * 4) or zero(x))
        patch.setattr(timing, "cpu_clock", lambda run: order.append("timed") or 1.0)
        assert clock(lambda: None) == 1.0
    assert order == [timing.FLUSH_BYTES, "timed"]


def test_contexts_are_shortened_by_the_pass_that_takes_longest(small: Workload) -> None:
    """A decoding step is short at any context: it does not say what a forward pass takes."""
    workload = replace(small, may_shorten=True, contexts=(1024, 4096))
    trained, both = (
        Scheduler(replace(workload, passes=passes), SLOW, TimeLimit(60.0)).contexts(workload.subjects[0])
        for passes in (("train",), ("train", "decode"))
    )
    assert trained == both != [1024, 4096]


def test_rows_stand_in_the_order_of_the_workload(monkeypatch: pytest.MonkeyPatch, small: Workload) -> None:
    """Whichever is timed first: a table is read by comparing the same lines at every context."""

    def backwards(runs: dict[Any, Run], _clock: Any, _allowance: float, samples: dict[Any, list[float]], *_) -> None:
        for timed in reversed(runs):
            samples.setdefault(timed, []).append(1.0)

    monkeypatch.setattr(runner, "prepare", lambda *_: lambda: None)
    monkeypatch.setattr(runner, "sample_until_settled", backwards)
    monkeypatch.setattr(Runner, "_warmed_up", lambda *_: lambda: None)
    workload = workload_of(catalogue_spec("gpt2-small"), passes=("forward",), contexts=[64, 128])
    rows = Session(workload, HOUR).run().results
    names = [row.name for row in rows if row.part == "state" and row.context == 128]
    assert names == [timed.name for timed in workload.mixers]


@pytest.mark.parametrize(("rate", "remarked"), [(1e9, True), (150e9, False)])
def test_slow_products_are_remarked(rate: float, remarked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_rate", lambda *_: 190e9)
    note = machine.emulation_note(replace(SLOW, matmul_flops_per_s=rate), "fp16")
    assert (note is not None) == remarked
    if note:
        assert note.startswith("products in fp16 run at 1 GFLOP/s here, and at 190 in fp32")
    assert machine.emulation_note(replace(SLOW, matmul_flops_per_s=rate), "fp32") is None


def test_a_small_product_measures_the_rate_where_a_dtype_is_emulated() -> None:
    """Larger ones would take minutes: 2 x 1024^3 FLOPs at 0.3 GFLOP/s are 7 seconds a run."""
    rows: list[int] = []

    def emulated(run: Run) -> float:
        rows.append(run.__closure__[0].cell_contents.shape[0])  # type: ignore[attr-defined]
        return 2 * rows[-1] ** 3 / 0.3e9

    assert timing.matmul_rate("cpu", torch.float32, emulated) == pytest.approx(0.3e9)
    assert set(rows) == {256}
