"""A model small enough to be timed in a test, one thread to a worker, and profiles that no clock can spoil."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from powerplan.cli import main
from powerplan.hardware import Peak
from powerplan.profile import crossover, runner, session, timing
from powerplan.profile.costs import run_costs
from powerplan.profile.machine import Machine
from powerplan.profile.timing import Run
from powerplan.profile.workload import Point, TimedMixer, Workload

TINY = """
name: tiny
vocab_size: 100
hidden_size: 32
norm: {kind: rmsnorm, per_layer: 2}
layers:
  - repeat: 2
    mixer: {kind: attention, heads: 4, kv_heads: 2, head_dim: 8}
    ffn: {kind: mlp, intermediate_size: 64}
"""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_text() -> str:
    return TINY


@pytest.fixture
def tiny(tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write tiny.yaml into an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_text, encoding="utf-8")
    return path


@contextmanager
def _little_work() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "MIN_REPEATS", 2)
        patch.setattr(timing, "MAX_REPEATS", 2)
        patch.setattr(crossover, "LONGEST", 512)
        yield


@pytest.fixture
def little_work() -> Iterator[None]:
    """Let a profile end because its work is done: two repeats of each run, and no crossover sought at long contexts.

    With a time limit far beyond that, what is measured does not depend on how fast the machine is, or how busy.
    """
    with _little_work():
        yield


@pytest.fixture(scope="session")
def whole(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of one whole profile, with everything that can be asked for."""
    options = ["--p", "2,3", "--against", "softmax,window,linear", "--pass", "decode,train,forward"]
    options += ["--chunk-size", "32,64", "--breakdown", "--ctx", "64, 256", "--time-limit", "2h"]
    folder = tmp_path_factory.mktemp("profile")
    (folder / "tiny.yaml").write_text(tiny_text, encoding="utf-8")
    path = folder / "out.json"
    with _little_work():
        assert main(["profile", str(folder / "tiny.yaml"), *options, "--save", str(path)]) == 0
    return path


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass in runs only, and each run take its roofline time on a machine of 10 GFLOP/s, without any work.
    Return a function that lets more seconds pass."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    peak = Peak("simulated", Fraction(10**10), Fraction(10**12), "test")

    def prepare(workload: Workload, timed: TimedMixer, point: Point) -> Run:
        seconds = peak.roofline_s(*map(float, run_costs(workload, timed, point, executed=True)))

        def run() -> None:
            now[0] += seconds

        return run

    def clock(run: Run) -> float:
        start = now[0]
        run()
        return now[0] - start

    def peak_of(run: Run, device: str) -> int:
        run()
        return 1

    machine = Machine("cpu", "simulated", clock, 1e10, 1e12, peak, 1)
    monkeypatch.setattr(session, "examine", lambda device, dtype: machine)
    monkeypatch.setattr(runner, "prepare", prepare)
    monkeypatch.setattr(runner, "peak_of", peak_of)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return sleep
