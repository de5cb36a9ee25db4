"""The order and the clocks of a session, without the seconds that whole profiles take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from powerplan.load import catalogue_spec
from powerplan.profile import machine, session, timing
from powerplan.profile.machine import Machine
from powerplan.profile.plan import Contender, Plan, plan_of
from powerplan.profile.session import Session
from powerplan.profile.timing import Run, cpu_clock

SLOW = Machine("cpu", "a slow one", cpu_clock, 1e9, 1e12, 1e9, 1e12, "test", 1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Return a plan of all passes that a session runs in no time: on a known machine, without checks."""
    monkeypatch.setattr(session, "examine", lambda device, dtype: SLOW)
    monkeypatch.setattr(Session, "_check_all", lambda self: None)
    passes = ("forward", "train", "decode")
    return plan_of(catalogue_spec("gpt2-small"), against="none", passes=passes, contexts=[64, 128])


def test_decoding_comes_before_what_may_take_all_the_time(small: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []

    def nothing(plan: Plan, contender: Contender, place: Any) -> Run:
        places.append(place)
        return lambda: None

    monkeypatch.setattr(session, "prepare", nothing)
    Session(small, 60.0).run()
    kinds = [(kind, tokens) for part, kind, tokens in places if part == "state"]
    assert kinds[:4] == [("decode", 64), ("decode", 128), ("forward", 64), ("train", 64)]


def test_decoding_steps_find_cold_caches_on_a_processor(small: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def noted(plan: Plan, contender: Contender, place: Any) -> Run:
        return lambda: runs.append((place[1], now[0]))

    monkeypatch.setattr(session, "cold_cpu_clock", clock)
    monkeypatch.setattr(session, "prepare", noted)
    Session(small, 60.0).run()
    assert flushes[0] > 0
    assert set(runs) == {("decode", "cold"), ("forward", ""), ("train", "")}
    flushes[0] = 0
    Session(replace(small, passes=("forward",)), 60.0).run()
    assert flushes[0] == 0


def test_the_cold_clock_fills_caches_outside_the_time() -> None:
    clock, order = timing.cold_cpu_clock(), []
    zero = torch.Tensor.zero_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "zero_", lambda x: order.append(x.numel() * 4) or zero(x))
        patch.setattr(timing, "cpu_clock", lambda run: order.append("timed") or 1.0)
        assert clock(lambda: None) == 1.0
    assert order == [timing.FLUSH_BYTES, "timed"]


def test_chosen_contexts_are_as_short_as_the_dearest_pass_needs(small: Plan) -> None:
    """A decoding step is cheap at any context: it does not say what a forward pass costs."""
    chosen = replace(small, chosen=True, contexts=(1024, 4096))
    trained = Session(replace(chosen, passes=("train",)), 60.0)
    both = Session(replace(chosen, passes=("train", "decode")), 60.0)
    for item in (trained, both):
        item.machine = SLOW
    assert trained._contexts() == both._contexts() != [1024, 4096]


def test_rows_stand_in_the_order_of_the_plan(monkeypatch: pytest.MonkeyPatch, small: Plan) -> None:
    """Whichever is timed first: dear ones are not, and a table is read by comparing the same lines."""

    def backwards(runs: dict[Any, Run], _clock: Any, _allowance: float, samples: dict[Any, list[float]]) -> None:
        for name in reversed(runs):
            samples.setdefault(name, []).append(1.0)

    monkeypatch.setattr(session, "prepare", lambda *_: lambda: None)
    monkeypatch.setattr(session, "repeated", backwards)
    monkeypatch.setattr(Session, "_warm", lambda *_: lambda: None)
    plan = plan_of(catalogue_spec("gpt2-small"), passes=("forward",), contexts=[64, 128])
    found = [row.name for row in Session(plan, 60.0).run().results if row.part == "state" and row.context == 128]
    assert found == [item.name for item in plan.contenders]


@pytest.mark.parametrize(("rate", "remarked"), [(1e9, True), (150e9, False)])
def test_slow_products_are_remarked(rate: float, remarked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_rate", lambda *_: 190e9)
    found = machine.slow_products(replace(SLOW, matmul_flops_per_s=rate), "fp16")
    assert (found is not None) == remarked
    if found:
        assert found.startswith("products in fp16 run at 1 GFLOP/s here, and at 190 in fp32")
    assert machine.slow_products(replace(SLOW, matmul_flops_per_s=rate), "fp32") is None
