"""Cold start of `powerplan wsfr gpt2-small --ctx 64k`, beside `python -c 'import typer'`: fresh processes in turn.

Usage: python benchmarks/startup.py [RESULT.json]
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from powerplan.version import __version__
from support.files import print_result

COMMAND = ["wsfr", "gpt2-small", "--ctx", "64k"]
TARGET_RATIO = 2.5
ROUNDS = 15


def main() -> int:
    script = Path(sys.executable).with_name("powerplan")
    # With bytecode from the run before, as after any install; compiling anew takes 50 ms.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    expected = subprocess.run([script, *COMMAND], check=True, capture_output=True, text=True, env=env).stdout
    if "1:4.89" not in expected:
        print(f"wrong answer, so nothing is timed:\n{expected}", file=sys.stderr)
        return 1
    commands = {"powerplan": [str(script), *COMMAND], "typer": [sys.executable, "-c", "import typer"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(ROUNDS + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=env)
            if turn:  # The first of each reads files that the others find in memory.
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    result = {
        "schema": "powerplan.startup/2",
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"powerplan": __version__} | {name: version(name) for name in ("msgspec", "typer", "pyyaml")},
        "seconds": [round(value, 4) for value in sorted(times["powerplan"])],
        "typer_seconds": [round(value, 4) for value in sorted(times["typer"])],
        "median_s": round(medians["powerplan"], 4),
        "typer_median_s": round(medians["typer"], 4),
        "ratio": round(medians["powerplan"] / medians["typer"], 2),
        "target_ratio": TARGET_RATIO,
    }
    print_result(result, next(iter(sys.argv[1:]), None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
