"""The attention benchmark on a tiny shape: checks before it times, compares, explains what it leaves out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from powerplan.profile import timing

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from attention import main  # noqa: E402

TINY = ["--contexts", "64, 128", "--head-dims", "8", "--heads", "2", "--kv-heads", "1", "--repeats", "3"]
TINY += ["--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Return the JSON of a tiny run of the script and what it printed. Its time is enough for all repeats."""
    out = tmp_path_factory.mktemp("attention") / "folder" / "result.json"
    impls = "power-torch,sdpa-math,sdpa-flash,window,retention"
    arguments = [*TINY, "--p", "2,3", "--impls", impls, "--no-memory", "--breakdown", "--time-limit", "1000000"]
    # A cache is filled some 1,000 times: 41 s with what holds 256 MiB.
    with patch.object(timing, "FLUSH_BYTES", 2**20), redirect_stdout(StringIO()) as printed:
        assert main([*arguments, "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]
    return json.loads(out.read_text(encoding="utf-8")), printed.getvalue()


def test_rows(tiny: tuple[dict[str, Any], str]) -> None:
    data, _ = tiny
    assert data["schema"] == "powerplan.attention-benchmark/1"
    assert data["machine"]["threads"] == 1
    measured = [row for row in data["rows"] if "seconds" in row]
    places = {(row["pass"], row["context"]) for row in measured}
    assert places == {(kind, tokens) for kind in ("forward", "train", "decode") for tokens in (64, 128)}
    for row in measured:
        time = row["seconds"]
        assert 0 < time["p20"] <= time["median"] <= time["p80"]
        assert time["repeats"] == (60 if row["pass"] == "decode" else 3)
        assert row["flops"] > 0
        assert 0 < row["share_of_matmul"] < 1
        assert row["checked"]["share_of_budget"] <= 1
    power = [row for row in measured if row["impl"] == "power-torch" and row["pass"] == "forward"]
    assert {(row["p"], row["gated"]) for row in power} == {(p, gated) for p in (2, 3) for gated in (False, True)}
    names = {part["name"] for row in power for part in row.get("breakdown", ())}
    assert {"power: within chunk", "aten::bmm"} <= names


def test_ratios_are_over_the_fastest_backend(tiny: tuple[dict[str, Any], str]) -> None:
    data, _ = tiny
    rows = [row for row in data["rows"] if row["pass"] == "train" and row["context"] == 128 and "seconds" in row]
    fastest = min(row["seconds"]["median"] for row in rows if row["impl"].startswith("sdpa-"))
    for row in rows:
        assert row["over_fastest_sdpa"] == pytest.approx(fastest / row["seconds"]["median"])


def test_what_cannot_run_is_named(tiny: tuple[dict[str, Any], str]) -> None:
    data, printed = tiny
    reasons = {row["skipped"] for row in data["rows"] if row["impl"] == "retention"}
    assert reasons & {"the package retention is not installed", "retention runs on CUDA devices only"}
    assert "not measured\n  retention p=2: " in printed


def test_the_time_limit_leaves_out_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--passes", "forward", "--contexts", "64, 64M", "--impls", "sdpa-flash", "--time-limit", "7200"]
    assert main([*TINY, *arguments]) == 0
    assert "sdpa-flash: a run would take about" in capsys.readouterr().out


def test_memory_of_a_run_is_beyond_inputs_and_outputs(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the resident set's high-water mark is read from /proc")
    out = tmp_path / "result.json"
    tiny = ["--passes", "forward", "--contexts", "4k", "--head-dims", "8", "--heads", "1", "--impls", "sdpa-math"]
    assert main([*tiny, "--repeats", "1", "--time-limit", "1000000", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    # The math backend holds 4096^2 weights, 67 MB, at least once.
    assert 60e6 < row["peak_bytes_beyond_inputs_and_outputs"] < 500e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impls", "flash"], "argument --impls: 'flash' is not known; did you mean sdpa-flash? allowed are"),
        (["--p", "5"], "argument --p: 5 is out of range; allowed are 1 to 4"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
