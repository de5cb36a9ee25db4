"""Cold start of `powerplan wsfr gpt2-small --ctx 64k`: a fresh process each time, median of ten (target 0.25 s).

Usage: python benchmarks/startup.py [RESULT.json]
"""

from __future__ import annotations

import json
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

COMMAND = ["wsfr", "gpt2-small", "--ctx", "64k"]
TARGET_S = 0.25


def main() -> int:
    script = Path(sys.executable).with_name("powerplan")
    # With bytecode from the run before, as after any install; compiling anew takes 50 ms.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    expected = subprocess.run([script, *COMMAND], check=True, capture_output=True, text=True, env=env).stdout
    if "1:4.89" not in expected:
        print(f"wrong answer, so nothing is timed:\n{expected}", file=sys.stderr)
        return 1
    times = []
    for _ in range(10):
        start = time.perf_counter()
        subprocess.run([script, *COMMAND], check=True, capture_output=True, env=env)
        times.append(time.perf_counter() - start)
    result = {
        "schema": "powerplan.startup/1",
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"powerplan": __version__}
        | {name: version(name) for name in ("msgspec", "typer", "pyyaml", "tabulate")},
        "seconds": [round(value, 4) for value in sorted(times)],
        "median_s": round(statistics.median(times), 4),
        "target_s": TARGET_S,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
