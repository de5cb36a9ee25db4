"""The GPU benchmark: its dry mode runs every step on a CPU; limits, crossovers, roles and targets on their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from support.gpu import targets  # noqa: E402
from support.gpu.others import OTHERS  # noqa: E402
from support.gpu.plan import CELLS, HOST, LONGEST, plan  # noqa: E402
from support.gpu.results import LISTS, SCHEMA, ResultFile  # noqa: E402
from support.gpu.roles import Launch, role_flops, role_of, role_records  # noqa: E402
from support.gpu.steps import SKIPPED, Step, failures, run_together  # noqa: E402
from support.shapes import flops  # noqa: E402


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "gpu.py", *map(str, arguments)]
    bare = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=bare | environment, timeout=400)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Return the result of a dry run of all steps, what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("gpu")
    # Far more than it takes alone: the tests beside it may take both cores.
    done = run("--dry", "--workers", 1, "--budget", 380, OUT=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8")), done.stdout, folder


@pytest.mark.slow
def test_all_steps_run_and_say_how_they_ended(dry: tuple[dict[str, Any], str, Path]) -> None:
    data, printed, folder = dry
    assert data["schema"] == SCHEMA
    ended = {step["name"]: step["ended"] for step in data["steps"]}
    names = {"machine", "precompile", "tests", "sanitize", "compile-others", "bench", "others"}
    assert ended == dict.fromkeys(names, "passed")
    assert {path.stem for path in (folder / "gpu-logs").iterdir()} == names
    assert "5 passed" in next(step["said"] for step in data["steps"] if step["name"] == "tests")
    assert data["versions"]["torch"] in printed


@pytest.mark.slow
def test_every_cell_has_rows_of_all_that_it_compares(dry: tuple[dict[str, Any], str, Path]) -> None:
    data, printed, _ = dry
    for cell in plan(dry=True).cells:
        rows = [row for row in data["rows"] if row["cell"] == cell.name and "seconds" in row]
        assert {row["impl"] for row in rows} == {"power-torch", *cell.peers}
        assert f"{cell.name:30} power-torch" in printed
        if cell.peers:
            fastest = min(row["seconds"]["median"] for row in rows if row["impl"] != "power-torch")
            (power,) = (row for row in rows if row["impl"] == "power-torch")
            assert power["over_fastest_sdpa"] == pytest.approx(fastest / power["seconds"]["median"])
            assert power["checked"]["share_of_budget"] <= 1
    assert {check["passed"] for check in data["checks"]} == {True}
    (host,) = data["host"]
    assert host["seconds"]["repeats"] == 50
    assert {record["cell"] for record in data["kernels"]} == {cell.name for cell in LONGEST.values()}
    assert {record["head_dim"] for record in data["crossovers"]} == {64, 128}
    skipped = {row["impl"]: row["skipped"] for row in data["rows"] if "skipped" in row}
    assert skipped["flex"] == "not in the dry mode"


@pytest.mark.slow
def test_targets_are_answered_from_the_rows(dry: tuple[dict[str, Any], str, Path]) -> None:
    data, printed, _ = dry
    assert len(data["targets"]) == len(targets.TARGETS)
    answered = {record["shape"]: record for record in data["targets"] if record["met"] is not None}
    first = answered["train B1 T64k H8 d64 gated"]
    row = targets.power_row(data, first["shape"])
    assert row is not None
    assert first["value"] == row["over_fastest_sdpa"]
    assert first["met"] == (row["over_fastest_sdpa"] >= 9)
    assert "train B1 T64k H8 d64 gated   fastest SDPA / power      >= 9.00" in printed


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("--out", tmp_path / "gpu.json", "--only", "bench", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "finds no CUDA device here; --dry goes through all steps on a CPU" in done.stdout
    assert "failed: machine" in done.stdout


def test_an_unknown_step_is_refused() -> None:
    done = run("--only", "test")
    assert done.returncode == 2
    assert "argument --only: test: allowed are precompile, tests, sanitize, bench, others" in done.stderr


def step(name: str, code: str, limit_s: float = 60.0, may_stop: bool = False) -> Step:
    return Step(name, ("-c", code), limit_s, may_stop=may_stop)


def test_steps_end_each_in_its_way(tmp_path: Path) -> None:
    hangs = "import time; print('begun', flush=True); time.sleep(600)"
    steps = [
        step("well", "print('fine')"),
        step("ill", "print('one'); print('two'); raise SystemExit(3)"),
        step("absent", f"print('not installed'); raise SystemExit({SKIPPED})"),
        step("hangs", hangs, 3.0),
        step("may hang", hangs, 3.0, may_stop=True),
    ]
    said: list[str] = []
    done = run_together(steps, tmp_path, said.append)
    assert [one.ended for one in done] == ["passed", "failed", "skipped", "stopped", "stopped"]
    assert failures(done, steps) == ["ill", "hangs"]
    assert done[3].said == "begun"
    assert "  one" in said
    assert (tmp_path / "ill.log").read_text(encoding="utf-8") == "one\ntwo\n"


def test_a_stopped_step_takes_its_processes_with_it(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    child = "import time; time.sleep(600)"
    code = f"""
import pathlib, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", {child!r}])
pathlib.Path({str(started)!r}).write_text(str(process.pid))
time.sleep(600)
"""
    (done,) = run_together([step("parent", code, 5.0)], tmp_path, lambda _: None)
    assert done.ended == "stopped"
    state = Path(f"/proc/{started.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_the_result_file_is_written_after_each_record(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "folder" / "gpu.json")
    assert file.read() == {"schema": SCHEMA} | {name: [] for name in LISTS}
    file.add("rows", {"cell": "a"})
    file.set(device="b")
    assert json.loads(file.path.read_text(encoding="utf-8"))["rows"] == [{"cell": "a"}]
    assert [path.name for path in file.path.parent.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({1024: 0.5, 4096: 2.0}, (2048, 1024, 4096)),  # the line through log 1/2 and log 2 is 0 half way
        ({4096: 2.0, 1024: 0.5, 2048: 1.5, 512: 1.2}, (1586, 1024, 2048)),  # the last one; 1024 * 2^(ln 2 / ln 3)
        ({1024: 1.1, 4096: 2.0}, (1024, None, 1024)),
        ({1024: 0.2, 4096: 0.9}, (None, 4096, None)),
        ({}, (None, None, None)),
    ],
)
def test_crossovers(ratios: dict[int, float], expected: tuple[int | None, ...]) -> None:
    assert targets.find_crossover(ratios) == expected


def test_a_crossover_that_is_nowhere_is_a_missed_target() -> None:
    data: dict[str, Any] = {name: [] for name in LISTS}
    target = next(target for target in targets.TARGETS if target.measure == "context of the crossover")
    assert target.record(data)["met"] is None
    data["crossovers"] = [{"head_dim": 64, "context": None, "contexts": {"1024": 0.5}}]
    assert target.record(data) | {"value": None, "met": False} == target.record(data)
    data["crossovers"] = [{"head_dim": 64, "context": 5000, "contexts": {"1024": 0.5}}]
    assert (target.record(data)["value"], target.record(data)["met"]) == (5000, True)


def test_targets_ask_for_cells_that_are_measured() -> None:
    names = [cell.name for cell in CELLS]
    assert len(names) == len(set(names))
    assert {other.cell for other in OTHERS} <= set(names)
    data = {name: [] for name in LISTS} | {
        "rows": [
            {"cell": name, "impl": "power-triton", "seconds": {"median": 1.0}, "over_fastest_sdpa": 2.0}
            | {"share_of_copy": 0.5}
            for name in names
        ]
        + [{"cell": names[0], "impl": "retention", "seconds": {"median": 3.0}}],
        "host": [{"cell": HOST.name, "seconds": {"median": 2e-4}}],
        "crossovers": [{"head_dim": d, "context": 4096, "contexts": {"4096": 1.0}} for d in (64, 128)],
        "roles": [
            {"cell": cell.name, "role": role, "share_of_matmul": 0.55}
            for cell in LONGEST.values()
            for role in targets.ROLE_BOUNDS
        ],
    }
    found = targets.records(data)
    assert [record for record in found if record["met"] is None] == []
    shown = targets.table(data | {"targets": found, "device": "a GPU", "date": "today", "versions": {"torch": "2"}})
    assert shown.endswith("a GPU; torch 2; today")
    assert "host time of a call       <= 0.400 ms  0.200 ms    0.50" in shown


def test_roles_share_the_useful_flops_of_a_training_call() -> None:
    cell = LONGEST[64]
    useful = role_flops(cell.shape, cell.power)
    assert sum(useful.values()) == pytest.approx(flops(cell.shape, cell.power))
    # 36 pairs of tiles of 8: 2,304 rows of phi, and 64 values and the normaliser; the first chunk asks no state.
    asking = 64 * 1024 - 1024
    assert useful["states backward"] == 2 * 8 * 2304 * 65 * asking
    launches = [
        Launch("log_g_cumsum_kernel", 0, 1e-5),
        Launch("scan_kernel", 0, 2e-3),
        Launch("output_kernel", 0, 1e-3),
        Launch("scan_kernel", 1, 2e-3),
        Launch("queries_kernel", 0, 2e-3),
        Launch("keys_kernel", 0, 3e-3),
    ]
    roles = ["other", "states", "output", "states backward", "dq", "dk, dv"]
    assert [role_of(launch) for launch in launches] == roles
    records = {record["role"]: record for record in role_records(launches, useful, 8e14, cell.name)}
    assert records["output"]["share_of_matmul"] == useful["output"] / 1e-3 / 8e14
    assert records["other"]["share_of_matmul"] is None
