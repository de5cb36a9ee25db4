"""Gluon kernels with faults, compiled for a GPU that is not here: the faults are found, and results kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compiler_runs import OTHER_TRITON, needs_other_triton, run

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLES = Path(__file__).with_name("compile_samples.py")


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
