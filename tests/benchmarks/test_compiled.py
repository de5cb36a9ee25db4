"""Kernels compiled for GPUs that are not here: no spills, within shared memory, matrix unit used, operands kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compiler_runs import OTHER_TRITON, needs_other_triton, run

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "compiled.py"

# What has not changed since is not compiled here, but for a sample: all of it takes eight minutes of CPU time.
KEPT = ROOT / "benchmarks" / "results" / "compiled.json"
OTHER_KEPT = KEPT.with_name("compiled-triton-3.6.json")

STATES = ("states", "expand", "contract")
GLUON = {f"{name}_kernel" for name in (*STATES, "output", "queries", "keys")}
FIXED = {f"fixed_{name}_kernel" for name in STATES}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_shipped_configurations_compile_without_a_fault(dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "compiled.json"
    done = run(SCRIPT, "--arch", 80, 90, "--dtype", dtype, "--workers", 1, "--kept", KEPT, "--again", 3, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = found["rows"]
    table = json.loads((ROOT / "kernels" / "triton" / "blocks.json").read_text(encoding="utf-8"))
    compiled = {(row["configuration"], row["arch"]) for row in rows if not row["configuration"].endswith(" hopper")}
    variants = {"bf16": 1, "fp16": 2, "fp32": 0}[dtype]  # for sm_90
    assert len(compiled) == sum((1 + variants * name.startswith("90")) for name in table if name.split()[1] == dtype)
    kernels = {row["kernel"] for row in rows}
    assert {"scan_kernel", "scan_kernel backward", "output_kernel", "queries_kernel", "keys_kernel"} <= kernels
    assert {"decode_kernel", "prepare_kernel", "running_kernel", "grad_log_g_kernel"} <= kernels
    for row in rows:
        assert row["local"] == row["stack"] == row["spills"] == 0
        assert row["operands"] == []
        assert row["shared"] <= 227 * 1024
        assert 0 < row["registers"] <= 255
    engine = [row for row in rows if row["gluon"]]
    assert {row["kernel"] for row in engine} == {"bf16": GLUON | FIXED, "fp16": GLUON, "fp32": set()}[dtype]
    assert {row["configuration"].split()[1] for row in engine} == (
        {"bf16": {"p=1", "p=2", "p=3", "p=4"}, "fp16": {"p=2"}, "fp32": set()}[dtype]
    )
    assert all(row["matrix"].get("HGMMA", 0) > 0 and row["remarks"] == [] for row in engine)
    products = [row for row in rows if row["arch"] == "sm_90" and row["kernel"].split("_")[0] in ("scan", "output")]
    assert products
    assert all(row["matrix"].get("HGMMA", 0) > 0 for row in products) or dtype == "fp32"
    check_kept(found, KEPT)


def check_kept(found: dict[str, Any], path: Path) -> None:
    """Check that a file of results is of the present kernels, for the version of Triton that it was written with."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    if found["triton"] == kept["triton"]:
        keys = {row["key"] for row in kept["rows"]}
        changed = sorted({row["kernel"] for row in found["rows"] if row["key"] not in keys})
        assert changed == [], f"changed since {path.name} was written: make compiled renews it"


@needs_other_triton
@pytest.mark.slow
def test_operands_of_shipped_configurations_are_kept_by_the_other_triton(tmp_path: Path) -> None:
    out = tmp_path / "compiled.json"
    settings = ("--arch", 90, "--dtype", "bf16", "fp16", "--workers", 1, "--kept", OTHER_KEPT, "--again", 3)
    run(SCRIPT, *settings, "--out", out, triton=OTHER_TRITON)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["triton"].startswith("3.6.")
    assert len(found["rows"]) > 100
    engine = [row for row in found["rows"] if row["gluon"]]
    assert {row["kernel"] for row in engine} == GLUON | FIXED
    assert [row for row in engine if row["faults"]] == []
    # Blocks of the others are chosen with the version of constraints.txt: with this one some spill, which is slow and
    # not wrong.
    faults = [fault for row in found["rows"] for fault in row["faults"] if not fault.startswith("spills: ")]
    assert faults == []
    assert all(row["operands"] == [] for row in found["rows"])
    check_kept(found, OTHER_KEPT)
