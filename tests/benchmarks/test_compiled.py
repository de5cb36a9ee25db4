"""Kernels compiled for GPUs that are not here: no spills, within shared memory, matrix unit used, operands kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "compiled.py"
SAMPLES = Path(__file__).with_name("compile_samples.py")

# What has not changed is not compiled again. `make clean` removes it.
CACHE = Path(os.environ.get("POWERPLAN_COMPILED_CACHE", ROOT / "build" / "compiled"))

# A folder with another version of Triton, the one of the GPU machines: `make triton36` makes it.
OTHER_TRITON = os.environ.get("POWERPLAN_TRITON_36")

GLUON = {f"{name}_kernel" for name in ("states", "expand", "contract", "output", "queries", "keys")}

needs_other_triton = pytest.mark.skipif(OTHER_TRITON is None, reason="POWERPLAN_TRITON_36 names no folder")


def run(*command: object, triton: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python, with the Triton in a folder if one is given."""
    # The interpreter, which other tests run in, has nothing to compile.
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        bare["PYTHONPATH"] = os.pathsep.join([triton, *filter(None, [bare.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, env=bare)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_shipped_configurations_compile_without_a_fault(dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "compiled.json"
    done = run(SCRIPT, "--arch", 80, 90, "--dtype", dtype, "--workers", 1, "--cache", CACHE, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    table = json.loads((ROOT / "kernels" / "triton" / "blocks.json").read_text(encoding="utf-8"))
    compiled = {(row["configuration"], row["arch"]) for row in rows if not row["configuration"].endswith(" hopper")}
    assert len(compiled) == sum(name.split()[1] == dtype for name in table)
    kernels = {row["kernel"] for row in rows}
    assert {"scan_kernel", "scan_kernel backward", "output_kernel", "queries_kernel", "keys_kernel"} <= kernels
    assert {"decode_kernel", "log_g_cumsum_kernel", "grad_log_g_kernel", "grad_norm_kernel"} <= kernels
    for row in rows:
        assert row["local"] == row["stack"] == row["spills"] == 0
        assert row["operands"] == []
        assert row["shared"] <= 227 * 1024
        assert 0 < row["registers"] <= 255
    engine = [row for row in rows if row["gluon"]]
    assert {row["kernel"] for row in engine} == (GLUON if dtype == "bf16" else set())
    assert all(row["matrix"].get("HGMMA", 0) > 0 and row["remarks"] == [] for row in engine)
    products = [row for row in rows if row["arch"] == "sm_90" and row["kernel"].split("_")[0] in ("scan", "output")]
    assert products
    assert all(row["matrix"].get("HGMMA", 0) > 0 for row in products) or dtype == "fp32"


@needs_other_triton
@pytest.mark.slow
def test_operands_of_shipped_configurations_are_kept_by_the_other_triton(tmp_path: Path) -> None:
    out = tmp_path / "compiled.json"
    run(*(SCRIPT, "--arch", 90, "--dtype", "bf16", "--workers", 1, "--cache", CACHE, "--out", out), triton=OTHER_TRITON)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["triton"].startswith("3.6.")
    assert len(found["rows"]) > 100
    engine = [row for row in found["rows"] if row["gluon"]]
    assert {row["kernel"] for row in engine} == GLUON
    assert [row for row in engine if row["faults"]] == []
    # Blocks of the others are chosen with the version of constraints.txt: with this one some spill, which is slow and
    # not wrong.
    faults = [fault for row in found["rows"] for fault in row["faults"] if not fault.startswith("spills: ")]
    assert faults == []
    assert all(row["operands"] == [] for row in found["rows"])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return what the samples' script printed, and the folder where it keeps results."""
    cache = tmp_path_factory.mktemp("samples") / "cache"
    done = run(SAMPLES, cache)
    assert done.returncode == 0, done.stderr
    return done.stdout, cache


def test_gluon_kernels_compile_and_their_faults_are_found(samples: tuple[str, Path]) -> None:
    check_samples(samples[0], other_triton=False)


@needs_other_triton
def test_the_other_triton_compiles_gluon_kernels_and_their_faults_are_found() -> None:
    done = run(SAMPLES, triton=OTHER_TRITON)
    assert done.returncode == 0, done.stderr
    check_samples(done.stdout, other_triton=True)


def check_samples(printed: str, other_triton: bool) -> None:
    found: dict[str, Any] = json.loads(printed)
    assert found["triton"].startswith("3.6.") == other_triton
    for name in ("right", "chain"):
        row = found[name]
        assert row["gluon"]
        assert row["matrix"]["HGMMA"] > 0
        assert row["operands"] == row["remarks"] == []
        assert row["stack"] == row["local"] == 0
    assert found["chain"]["registers"] <= 128  # maxnreg
    # A loop at run time in place of an unrolled one, and a result that is used before the wait.
    assert len(found["rolled"]["operands"]) == found["rolled"]["matrix"]["HGMMA"]
    assert all(x.startswith("overwritten operand: ") for x in found["rolled"]["operands"])
    assert "(C7517)" in found["early"]["remarks"][0]
    # Two iterations take turns with two sets of registers. Of three, ptxas makes one and waits for every product.
    assert "(C7513)" in found["three"]["remarks"][0]


def test_results_are_kept_until_a_kernel_changes(samples: tuple[str, Path], tmp_path: Path) -> None:
    first, cache = samples
    kept = sorted(cache.iterdir())
    times = [x.stat().st_mtime_ns for x in kept]
    assert len(kept) == 5
    again = run(SAMPLES, cache)
    assert again.stdout == first
    assert [x.stat().st_mtime_ns for x in sorted(cache.iterdir())] == times
    # A copy with another line in a function that outer_kernel calls, and chain_kernel does not.
    for name in ("tests/benchmarks/compile_samples.py", "tests/gluon_samples.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(
            text.replace("slot = step % STAGES", "slot = (step + 0) % STAGES"), encoding="utf-8"
        )
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    assert run(tmp_path / "tests/benchmarks/compile_samples.py", cache).returncode == 0
    assert len(list(cache.iterdir())) == len(kept) + 4
