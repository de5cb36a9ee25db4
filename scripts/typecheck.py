"""Type-check the installed package: powerplan, powerplan.kernels and powerplan.models, as users see them.

An editable install maps the last two through an import hook that no type checker follows, hence a plain install
into build/typecheck first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "typecheck"
SCRIPTS = ("scripts", "benchmarks", "examples")


def main() -> int:
    shutil.rmtree(TARGET, ignore_errors=True)
    # setuptools copies into build/lib and keeps what was there: a module that has been deleted would come back.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", TARGET, ROOT], check=True)
    # One run for all of it: reading what torch declares takes most of the time, and a second run would do it again.
    files: list[str | Path] = [TARGET / "powerplan", *SCRIPTS]
    mypy = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *files]
    return subprocess.run(mypy, cwd=ROOT, env=os.environ | {"MYPYPATH": str(TARGET)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
