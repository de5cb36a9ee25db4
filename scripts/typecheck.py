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


def main() -> int:
    shutil.rmtree(TARGET, ignore_errors=True)
    # setuptools copies into build/lib and keeps what was there: a module that has been deleted would come back.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", TARGET, ROOT], check=True)
    environment = os.environ | {"MYPYPATH": str(TARGET)}
    mypy: list[str | Path] = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    packages = subprocess.run([*mypy, "-p", "powerplan"], cwd=TARGET, env=environment, check=False).returncode
    scripts = subprocess.run(
        [*mypy, "scripts", "benchmarks", "examples"], cwd=ROOT, env=environment, check=False
    ).returncode
    return packages or scripts


if __name__ == "__main__":
    sys.exit(main())
