"""The GPU benchmark: its dry mode runs every step on a CPU; limits, crossovers, roles and targets on their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import HUNG_S

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from powerplan.dims import UNTRIED_HOPPER_FP16_HEAD_DIMS, UNTRIED_HOPPER_HEAD_DIMS, default_chunk_size  # noqa: E402
from powerplan.kernels.triton.support import takes_untried  # noqa: E402
from support.gpu import targets  # noqa: E402
from support.gpu.others import OTHERS  # noqa: E402
from support.gpu.plan import CELLS, HOST, LONGEST, plan  # noqa: E402
from support.gpu.results import LISTS, SCHEMA, ResultFile  # noqa: E402
from support.gpu.roles import Launch, role_flops, role_records, roles_of  # noqa: E402
from support.gpu.steps import SKIPPED, Step, failures, run_together  # noqa: E402
from support.gpu.untried import untried  # noqa: E402
from support.shapes import flops  # noqa: E402


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "gpu.py", *map(str, arguments)]
    bare = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    limit = 2 * HUNG_S
    return subprocess.run(command, capture_output=True, text=True, check=False, env=bare | environment, timeout=limit)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Return the result of a dry run of all steps, what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("gpu")
    # Far more than it takes: it ends when its work is done.
    done = run("--dry", "--workers", 1, "--budget", HUNG_S, OUT=str(folder))
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
    # The budget is that of a busy machine.
    done = run("--out", tmp_path / "gpu.json", "--only", "bench", "--budget", HUNG_S, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "finds no CUDA device here; --dry goes through all steps on a CPU" in done.stdout
    assert "failed: machine" in done.stdout


def test_an_unknown_step_is_refused() -> None:
    done = run("--only", "test")
    assert done.returncode == 2
    assert "argument --only: test: allowed are precompile, tests, sanitize, bench, others" in done.stderr


def step(name: str, code: str, limit_s: float = HUNG_S, may_stop: bool = False) -> Step:
    return Step(name, ("-c", code), limit_s, may_stop=may_stop)


def limits_pass_after(monkeypatch: pytest.MonkeyPatch, events: dict[float, Callable[[], bool]]) -> None:
    """Let the limits of steps, in seconds, pass once their events have happened, however long those take."""
    wait = subprocess.Popen.wait

    def wait_for_event(process: subprocess.Popen[str], timeout: float | None = None) -> int:
        while timeout in events and not events[timeout]():
            time.sleep(0.05)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_event)


def test_steps_end_each_in_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = f"import time; print('begun', flush=True); time.sleep({HUNG_S})"
    steps = [
        step("well", "print('fine')"),
        step("ill", "print('one'); print('two'); raise SystemExit(3)"),
        step("absent", f"print('not installed'); raise SystemExit({SKIPPED})"),
        step("hangs", hangs, 3.0),
        step("may hang", hangs, 0.1, may_stop=True),
    ]
    log = tmp_path / "hangs.log"
    limits_pass_after(monkeypatch, {3.0: lambda: log.exists() and "begun" in log.read_text(encoding="utf-8")})
    said: list[str] = []
    done = run_together(steps, tmp_path, said.append)
    assert [one.ended for one in done] == ["passed", "failed", "skipped", "stopped", "stopped"]
    assert failures(done, steps) == ["ill", "hangs"]
    assert done[3].said == "begun"
    assert "  one" in said
    assert (tmp_path / "ill.log").read_text(encoding="utf-8") == "one\ntwo\n"


def test_a_stopped_step_takes_its_processes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "pid"
    child = f"import time; time.sleep({HUNG_S})"
    code = f"""
import pathlib, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", {child!r}])
pathlib.Path({str(started)!r}).write_text(str(process.pid))
time.sleep({HUNG_S})
"""
    limits_pass_after(monkeypatch, {3.0: lambda: started.exists() and bool(started.read_text())})
    (done,) = run_together([step("parent", code, 3.0)], tmp_path, lambda _: None)
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


def test_what_no_gpu_has_run_is_timed_beside_what_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERPLAN_HOPPER", "all")
    beside = {cell.name.removesuffix(", untried") for cell in CELLS if cell.untried}
    of_dtypes = {
        dtype: {cell.power.p for cell in CELLS if cell.untried and cell.shape.dtype == dtype}
        for dtype in ("bf16", "fp16")
    }
    assert of_dtypes == {"bf16": UNTRIED_HOPPER_HEAD_DIMS.keys(), "fp16": UNTRIED_HOPPER_FP16_HEAD_DIMS.keys()}
    assert beside <= {cell.name for cell in CELLS if not cell.untried}
    for wanted in (False, True):
        with untried(wanted):
            assert takes_untried() == wanted
    assert os.environ["POWERPLAN_HOPPER"] == "all"
    monkeypatch.undo()
    takes_untried.cache_clear()


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
    chunk = default_chunk_size(64, 2, "triton")
    # 36 pairs of tiles of 8: 2,304 rows of phi, and 64 values; the first chunk asks no state, the last adds to none.
    product = 2 * 8 * 2304 * 64 * (64 * 1024 - chunk)
    assert useful["states"] == useful["states backward"] == product
    within = 8 * 64 * 1024 * (chunk + 1) // 2 * 2 * (64 + 64)
    assert useful["output"] == useful["dq"] == product + within
    assert useful["dk, dv"] == 2 * product + within
    # The planner counts 2,080 distinct entries in place of 2,304 rows, and the normaliser.
    assert sum(useful.values()) == pytest.approx(flops(cell.shape, cell.power), rel=0.1)


def launched(*names: str) -> list[Launch]:
    return [Launch(name, names[:index].count(name), 1e-3) for index, name in enumerate(names)]


def test_every_launch_of_the_hopper_engine_has_its_role() -> None:
    step = launched(
        *("prepare_kernel", "states_kernel", "running_kernel", "expand_kernel", "output_kernel"),
        *("prepare_kernel", "states_kernel", "running_kernel", "contract_kernel", "queries_kernel"),
        *("contract_kernel", "expand_kernel", "keys_kernel", "grad_log_g_kernel"),
        "void at::native::direct_copy_kernel_cuda",
    )
    assert roles_of(step) == [
        *("prepare", "states", "states", "output", "output"),
        *("prepare backward", "states backward", "states backward"),
        *("dq", "dq", "dk, dv", "dk, dv", "dk, dv", "other", "other"),
    ]
    useful = role_flops(LONGEST[64].shape, LONGEST[64].power)
    records = {record["role"]: record for record in role_records(step, useful, 8e14, "a cell")}
    states, alone = records["states"], records["states, states_kernel alone"]
    assert states["kernels"] == ["running_kernel", "states_kernel"]
    assert states["share_of_matmul"] == pytest.approx(useful["states"] / 2e-3 / 8e14)
    for role in ("prepare", "prepare backward"):
        assert records[role]["kernels"] == ["prepare_kernel"]
        assert records[role]["seconds"] == 1e-3
        assert records[role]["share_of_matmul"] is None
    assert alone["share_of_matmul"] == pytest.approx(useful["states"] / 1e-3 / 8e14)
    assert records["dk, dv"]["seconds"] == pytest.approx(3e-3)
    assert records["other"]["share_of_matmul"] is None


def test_launches_for_the_normaliser_of_p_4_have_the_roles_of_what_they_add_to() -> None:
    found = launched(
        *("prepare_kernel", "fixed_states_kernel") * 2,
        *("running_kernel", "running_kernel"),
        *("fixed_expand_kernel", "fixed_expand_kernel", "output_kernel"),
        *("prepare_kernel", "fixed_states_kernel") * 2,
        *("running_kernel", "running_kernel"),
        *("fixed_expand_kernel", "fixed_contract_kernel", "queries_kernel"),
        *("fixed_expand_kernel", "fixed_contract_kernel", "fixed_expand_kernel", "keys_kernel"),
    )
    states = [*("prepare", "states") * 2, "states", "states"]
    backward = [f"{role} backward" for role in states]
    expected = [*states, *["output"] * 3, *backward, *["dq"] * 3, *["dk, dv"] * 4]
    assert roles_of(found) == expected


def test_every_launch_of_the_other_engine_has_its_role() -> None:
    found = launched(
        *("prepare_kernel", "scan_kernel", "running_kernel", "output_kernel"),
        *("prepare_kernel", "scan_kernel", "running_kernel", "queries_kernel", "keys_kernel"),
    )
    assert roles_of(found) == [
        *("prepare", "states", "states", "output"),
        *("prepare backward", "states backward", "states backward", "dq", "dk, dv"),
    ]


def test_steps_run_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    asked = ("--only", "bench,precompile", "--limits", "bench=1,precompile=1")  # They need not do their work.
    done = run("--dry", *asked, "--budget", HUNG_S, "--workers", 1, "--out", tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [step["name"] for step in data["steps"]] == ["machine", "bench", "precompile"], done.stdout
    assert data["steps"][1]["limit_s"] == pytest.approx(1, abs=0.01)


def test_limits_are_steps_and_seconds() -> None:
    assert "argument --limits: bench: give a step and its seconds, such as bench=90" in run("--limits", "bench").stderr
    assert "argument --limits: test: allowed are precompile" in run("--limits", "test=3").stderr


def test_what_would_be_compiled_is_compiled_under_the_same_name(tmp_path: Path) -> None:
    """Launches are recorded and compiled elsewhere; the JIT then finds every kernel in Triton's cache."""
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from powerplan.kernels.triton.gates import grad_log_g_kernel
from support.gpu.precompile import compile_source, recorded

class NoGpu:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    is_active = lambda self: True

driver.set_active(NoGpu())
gates, table = torch.empty(64, 2), torch.zeros(1, 4, dtype=torch.int64)

def call():
    for p in (1, 2):
        grad_log_g_kernel[(2,)](*[gates] * 5, table, 2, 3, P=p, REPEATS=1, BLOCK=64, PARTS=4, num_warps=4)

sources, hits = [], []
with recorded(sources.append):
    call()
    call()
assert len(sources) == 2, sources
for source in sources:
    compile_source(source)
triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
usual = JITFunction._do_compile
JITFunction._do_compile = lambda *arguments: usual(*arguments) and None
call()
print(hits)
"""
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = bare | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "[True, True]\n", done.stdout + done.stderr
