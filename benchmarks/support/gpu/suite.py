"""The step that tests: all kernel tests on the device, in parallel by pytest-xdist, or without it by file.

Those of the Hopper engine come first, in a run of their own: pytest-xdist shares out all tests at once. Those of its
kernels that no GPU has run come last, in the tests of their degrees.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent.parent
TESTS = ROOT / "tests" / "kernels"

FIRST = (
    "hopper or (test_gpu_shapes and not (test_other_degrees or dtype1 or dtype2)) or (test_low_precision and dtype0)"
)
"""Tests that come first, as pytest -k takes it: p = 2 in bfloat16, which is the first dtype of each list of dtypes."""

UNTRIED_FILES = [TESTS / "test_gpu_shapes.py", TESTS / "test_against_oracle.py", TESTS / "test_float16.py"]
UNTRIED = (
    "(test_other_degrees and not dtype1) or (test_second_degree and dtype1) or (test_low_precision and triton) "
    "or test_float16"
)
"""Tests that run once more, with what no GPU has run in the Hopper engine: other degrees in bfloat16, and float16."""

NO_TESTS = 5
"""pytest's exit status where a file has no test that was asked for."""


def command(paths: list[Path], workers: int, dry: bool, which: str | None = None) -> list[str]:
    """Return the command for these files. Warnings of a torch and triton that CI has not seen are shown, not raised.

    which: Tests of them, as pytest -k takes it.
    """
    options = ["-q", "-W", "default", "--tb=short", "-p", "no:cacheprovider", "--disable-warnings"]
    options += ["-p", "support.gpu.at_once"]
    if dry:
        which = "test_chunk_sizes and torch"
    elif find_spec("xdist") is not None and workers > 1:
        options += ["-p", "xdist.plugin", "-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "4"]
    if which is not None:
        options += ["-k", which]
    return [sys.executable, "-m", "pytest", *options, *map(str, paths)]


def run(paths: list[Path], workers: int, dry: bool, which: str | None = None, hopper: str = "") -> tuple[int, str]:
    """Return pytest's exit status and its last line; its output is passed on. hopper: a value of POWERPLAN_HOPPER."""
    # Other plugins that are installed would only be imported, by each worker.
    device = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "POWERPLAN_HOPPER": hopper}
    device |= {} if dry else {"POWERPLAN_TEST_DEVICE": "cuda"}
    done = subprocess.Popen(
        command(paths, workers, dry, which),
        cwd=ROOT,
        env=os.environ | device,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last = ""
    assert done.stdout is not None
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return done.wait(), last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.dry:
        status, last = run([TESTS / "test_against_oracle.py"], 1, True)
        print(last)
        return 1 if status else 0
    if find_spec("xdist") is not None or options.workers == 1:
        found = [run([TESTS], options.workers, False, which) for which in (FIRST, f"not ({FIRST})")]
        found.append(run(UNTRIED_FILES, options.workers, False, UNTRIED, "all"))
        print("; ".join(last for _, last in found))
        return 1 if any(status for status, _ in found) else 0
    files = sorted(TESTS.glob("test_*.py"))
    with ThreadPoolExecutor(options.workers) as pool:
        results = list(pool.map(lambda path: run([path], 1, options.dry), files))
        results += pool.map(lambda path: run([path], 1, options.dry, UNTRIED, "all"), UNTRIED_FILES)
    files += UNTRIED_FILES
    failed = [path.name for path, (status, _) in zip(files, results, strict=True) if status not in (0, NO_TESTS)]
    print(f"{len(files) - len(failed)} of {len(files)} files passed{': not ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
