"""What a profile keeps when it is cut short: by Ctrl-C, for want of memory, by its time limit."""

from __future__ import annotations

import csv
import importlib
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from profiled import QUICK, profiled

from powerplan.choices import Format
from powerplan.cli import main
from powerplan.profile import checks, runner, session
from powerplan.profile.result import CheckResult
from powerplan.profile.workload import Point, TimedMixer, Workload

pytestmark = pytest.mark.usefixtures("little_work")


@contextmanager
def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> Iterator[None]:
    """Let the run that follows `after` others raise `error`, in its preparation."""
    prepare, count = runner.prepare, 0

    def failing(workload: Workload, timed: TimedMixer, point: Point) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise error
        return prepare(workload, timed, point)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "prepare", failing)
        yield


def test_an_interrupt_keeps_what_was_measured(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with raising(monkeypatch, KeyboardInterrupt(), after=5):
        profile = profiled(tiny, "--pass", "forward", code=130)
    assert profile.interrupted
    assert [row.part for row in profile.results] == ["projections", "ffn", "state", "state", "state"]
    captured = capsys.readouterr()
    assert "all that was to follow: interrupted" in captured.out
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: interrupted"]
    assert main(["profile", "--show", "out.json"]) == 0  # What is shown again was not interrupted now.


@pytest.mark.parametrize("form", get_args(Format))
def test_an_interrupt_keeps_its_rows_in_every_format(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    command = ["profile", str(tiny), *QUICK, "--pass", "forward", "--plot", "out.png", "--format", form]
    with raising(monkeypatch, KeyboardInterrupt(), after=5):
        assert main(command) == 130
    out = capsys.readouterr().out
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    if form == "json":
        data = json.loads(out)
        assert data["interrupted"]
        assert len(data["results"]) == 5
    elif form == "csv":
        assert [row["part"] for row in csv.DictReader(io.StringIO(out))] == ["state"] * 3 + ["projections", "ffn"]
    else:
        assert "interrupted: what was measured until then" in out
        assert "window 18" in out


def test_an_interrupt_before_any_mixer_draws_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with raising(monkeypatch, KeyboardInterrupt(), after=2):
        profile = profiled(tiny, "--pass", "forward", "--plot", "out.png", code=130)
    assert [row.part for row in profile.results] == ["projections", "ffn"]
    assert "note: out.png is not written: no time of a mixer was measured" in capsys.readouterr().err
    assert not Path("out.png").exists()


def test_what_was_measured_is_saved_before_it_is_printed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("powerplan.cli.say.show", gone)
    monkeypatch.setattr("powerplan.cli.dispatch.abandon", lambda stream: None)
    profile = profiled(tiny, "--pass", "forward", "--ctx", "64", "--against", "none")
    assert profile.results


def test_an_interrupt_within_a_turn_keeps_its_samples(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = runner.sample_until_settled

    def cut(runs: dict[TimedMixer, Any], *settings: Any) -> None:
        sample(runs, *settings)
        if any(timed.name == "attention" for timed in runs):
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "sample_until_settled", cut)
    profile = profiled(tiny, "--pass", "forward", code=130)
    assert [row.part for row in profile.results] == ["projections", "ffn", "state", "state", "state"]


def test_an_interrupt_before_anything_is_an_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with raising(monkeypatch, KeyboardInterrupt(), after=0):
        assert main(["profile", str(tiny), *QUICK, "--save", "out.json"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("error: interrupted\n")
    assert not Path("out.json").exists()


def test_out_of_memory_goes_on_with_the_next(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = runner.prepare

    def failing(workload: Workload, timed: TimedMixer, point: Point) -> Any:
        if timed.name == "attention" and point.part == "state":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return prepare(workload, timed, point)

    monkeypatch.setattr(runner, "prepare", failing)
    profile = profiled(tiny, "--pass", "forward")
    assert {row.name for row in profile.part("state")} == {"power p=2", "window 18"}
    assert "state, forward, 64 tokens: attention: out of memory" in capsys.readouterr().out


def test_a_real_allocation_beyond_the_limit_fails_and_the_process_lives_on(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("the address space is limited on Linux only")
    monkeypatch.setattr(runner, "bytes_needed", lambda workload, timed, point: 0)
    options = ["--impl", "reference", "--against", "none", "--memory-limit", "1MiB", "--ctx", "64,16k"]
    profile = profiled(tiny, "--pass", "forward", *options)
    assert {row.context for row in profile.part("state")} == {64}
    assert {(item.context, item.reason) for item in profile.missing if item.part == "state"} == {
        (16384, "out of memory")
    }


def test_a_context_too_large_for_the_memory_limit_is_left_out(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = profiled(tiny, "--pass", "forward", "--ctx", "64,64M", "--memory-limit", "1GiB")
    assert {row.context for row in profile.part("state")} == {64}
    text = " ".join(capsys.readouterr().out.split())
    assert "state, forward, 67,108,864 tokens: power p=2: it would take about 48 GiB, and the limit is 1 GiB" in text


def test_the_time_limit_leaves_out_what_does_not_fit(
    tiny: Path, simulated: object, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = profiled(tiny, "--pass", "forward", "--ctx", "64,512k", "--against", "attention", "--time-limit", "8")
    assert profile.seconds < 20
    assert {row.context for row in profile.part("state") if row.name == "attention"} == {64}
    assert {row.context for row in profile.part("state") if row.name == "power p=2"} == {64, 524_288}
    assert "attention from 524,288 tokens on" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("slow", "done"),
    [
        ("powerplan.answers.base.load_model", "torch was loaded"),
        ("powerplan.profile.session.examine", "the rates of this machine were measured"),
        ("powerplan.profile.checks.check_layer", "the checks ended"),
    ],
)
def test_a_time_limit_that_ends_before_anything_is_timed(
    tiny: Path,
    simulated: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    slow: str,
    done: str,
) -> None:
    module, _, name = slow.rpartition(".")
    function = getattr(importlib.import_module(module), name)

    def slowly(*args: Any, **settings: Any) -> Any:
        simulated(9.0)
        return function(*args, **settings)

    monkeypatch.setattr(slow, slowly)
    assert main(["profile", str(tiny), "--against", "none", "--time-limit", "8"]) == 4
    message = f"nothing was measured: {done} after 9.0 s, past the limit; give a longer --time-limit"
    assert message in capsys.readouterr().err


def test_a_mixer_without_time_for_its_check_is_not_timed(
    tiny: Path, simulated: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked: list[str] = []

    def slowly(workload: Workload, timed: TimedMixer) -> CheckResult:
        simulated(3.0)
        checked.append(timed.name)
        return CheckResult(timed.name, timed.impl, 0.1, "float64")

    monkeypatch.setattr(checks, "check_kernel", slowly)
    monkeypatch.setattr(checks, "check_layer", slowly)
    options = ["--p", "3,2", "--against", "attention", "--pass", "forward", "--ctx", "64", "--time-limit", "16"]
    profile = profiled(tiny, *options)
    assert checked == ["attention", "power p=2", "power p=2"]
    assert {row.name for row in profile.results} == {"attention", "power p=2"}
    assert "power p=3 (torch): the time limit left none for its check" in capsys.readouterr().out
    assert profile.seconds <= 16


def test_the_only_mixer_without_time_for_its_check(
    tiny: Path, simulated: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slowly(workload: Workload, timed: TimedMixer) -> CheckResult:
        simulated(9.0)
        return CheckResult(timed.name, timed.impl, 0.1, "float64")

    monkeypatch.setattr(checks, "check_layer", slowly)
    assert main(["profile", str(tiny), "--against", "attention", "--time-limit", "16"]) == 4
    assert "error: power p=2 (torch): the time limit left none for its check" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["200", "10h"])
def test_a_first_run_that_takes_five_times_as_long_does_not_count(
    tiny: Path, simulated: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Neither where a run is repeated, nor where the limit has time for one alone."""
    prepare, steady = runner.prepare, {}

    def slow_at_first(workload: Workload, timed: TimedMixer, point: Point) -> Any:
        run, calls = prepare(workload, timed, point), []

        def counted() -> None:
            start = time.monotonic()
            run()
            steady[point.part, point.direction, point.context, timed.name] = seconds = time.monotonic() - start
            if not calls:
                simulated(4 * seconds)
            calls.append(seconds)

        return counted

    monkeypatch.setattr(runner, "prepare", slow_at_first)
    monkeypatch.setattr(session, "check_all", lambda *_: None)
    profile = profiled(tiny, "--pass", "forward,train", "--ctx", "1k,64k", "--time-limit", limit)
    assert min(row.repeats for row in profile.results) == (2 if limit == "10h" else 1)
    for row in profile.results:
        assert row.ms_p50 / 1000 == pytest.approx(steady[row.part, row.direction, row.context, row.name])


@pytest.mark.parametrize("limit", [2, 5, 9, 14, 30])
def test_a_profile_ends_within_its_limit_and_one_run(
    tiny: Path, simulated: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Where every mixer takes as long as the others, and 16k tokens take two seconds, which nothing foretells."""
    longest = [0.0]

    def equal(workload: Workload, timed: TimedMixer, point: Point) -> Any:
        def run() -> None:
            simulated(seconds := point.tokens / 8192)
            longest[0] = max(longest[0], seconds)

        return run

    monkeypatch.setattr(runner, "prepare", equal)
    monkeypatch.setattr(session, "check_all", lambda *_: None)
    profile = profiled(tiny, "--pass", "forward,train", "--ctx", "1k,8k,16k,32k", "--time-limit", str(limit))
    assert profile.results
    assert profile.seconds <= limit + longest[0] + 0.1
    assert profile.missing
