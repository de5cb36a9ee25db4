"""Every entry of blocks.json compiled for GPUs that are not here: no spills, within shared memory, matrix unit used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "compiled.py"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_shipped_configurations_compile_without_a_fault(dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "compiled.json"
    # The interpreter, which other tests run in, has nothing to compile.
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--arch", "80", "90", "--dtype", dtype, "--workers", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    table = json.loads((ROOT / "kernels" / "triton" / "blocks.json").read_text(encoding="utf-8"))
    compiled = {(row["configuration"], row["arch"]) for row in rows}
    assert len(compiled) == sum(name.split()[1] == dtype for name in table)
    kernels = {row["kernel"] for row in rows}
    assert {"scan_kernel", "scan_kernel backward", "output_kernel", "queries_kernel", "keys_kernel"} <= kernels
    assert {"decode_kernel", "log_g_cumsum_kernel", "grad_log_g_kernel", "grad_norm_kernel"} <= kernels
    for row in rows:
        assert row["local"] == row["stack"] == 0
        assert row["shared"] <= 227 * 1024
        assert 0 < row["registers"] <= 255
    products = [row for row in rows if row["arch"] == "sm_90" and row["kernel"].split("_")[0] in ("scan", "output")]
    assert products
    assert all(row["matrix"].get("HGMMA", 0) > 0 for row in products) or dtype == "fp32"
