"""The first step: which GPU there is, and which versions; without a GPU nothing else can run."""

from __future__ import annotations

import argparse
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from powerplan.version import __version__
from support.gpu.results import ResultFile, versions
from support.report import device_name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device here; --dry goes through all steps on a CPU")
        return 1
    device = "cpu" if options.dry else "cuda"
    name = device_name(device)
    found = {"python": platform.python_version(), "powerplan": __version__} | versions()
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    ResultFile(options.out).set(date=datetime.now(UTC).date().isoformat(), device=name, versions=found)
    print(f"{name}, torch {found['torch']}, triton {found['triton']}, Python {found['python']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
