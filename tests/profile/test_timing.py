"""Repeats by a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from powerplan.profile import timing
from powerplan.profile.timing import MAX_REPEATS, MIN_REPEATS, Run, sample_until_settled, settled, spread
from powerplan.units import parse_seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[float]]], tuple[dict[str, Run], Callable]]:  # type: ignore[type-arg]
    """Return runs that take the seconds given, over and over, and the clock that believes them."""

    def make(times: dict[str, list[float]]) -> tuple[dict[str, Run], Callable]:  # type: ignore[type-arg]
        now = [0.0]
        monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
        counts = dict.fromkeys(times, 0)

        def run_of(name: str) -> Run:
            def run() -> float:
                seconds = times[name][counts[name] % len(times[name])]
                counts[name] += 1
                now[0] += seconds
                return seconds

            return run

        return {name: run_of(name) for name in times}, lambda run: run()

    return make


def test_steady_times_settle_early(machine: Callable) -> None:  # type: ignore[type-arg]
    runs, clock = machine({"a": [1.0], "b": [1.02, 0.98]})
    samples: dict[str, list[float]] = {}
    sample_until_settled(runs, clock, 1000, samples)
    assert {name: len(times) for name, times in samples.items()} == {"a": MIN_REPEATS, "b": MIN_REPEATS}
    assert settled(samples["b"])


def test_noise_is_repeated_and_ends(machine: Callable) -> None:  # type: ignore[type-arg]
    runs, clock = machine({"a": [1.0, 2.0, 3.0]})
    samples: dict[str, list[float]] = {}
    sample_until_settled(runs, clock, 1000, samples)
    assert len(samples["a"]) == MAX_REPEATS
    assert spread(samples["a"]).median == 2.0


def test_everything_gets_one_sample_and_the_longest_stop_first(machine: Callable) -> None:  # type: ignore[type-arg]
    runs, clock = machine({"long": [10.0, 12.0], "short": [0.1, 0.3]})
    samples: dict[str, list[float]] = {}
    sample_until_settled(runs, clock, 12.0, samples)
    assert len(samples["long"]) == 1
    assert len(samples["short"]) >= MIN_REPEATS


def test_few_samples_go_on_beyond_the_share_of_a_point(machine: Callable) -> None:  # type: ignore[type-arg]
    runs, clock = machine({"long": [10.0, 40.0, 10.0], "short": [1.0]})
    samples: dict[str, list[float]] = {}
    sample_until_settled(runs, clock, 12.0, samples, at_most=120.0)
    assert samples["long"] == [10.0, 40.0, 10.0]
    samples = {}
    sample_until_settled(runs, clock, 12.0, samples, at_most=20.0)
    assert len(samples["long"]) == 1


def test_a_first_run_that_counted_is_not_repeated_beyond_the_allowance(machine: Callable) -> None:  # type: ignore[type-arg]
    runs, clock = machine({"long": [10.0]})
    samples = {"long": [10.0]}
    sample_until_settled(runs, clock, 5.0, samples)
    assert samples == {"long": [10.0]}


def test_spread() -> None:
    times = spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (times.p20, times.median, times.p80, times.repeats) == (2.0, 3.5, 5.0, 6)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5 min", 90), ("2h", 7200)])
def test_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds
