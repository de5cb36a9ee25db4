"""Python with Triton's compiler, for tests that read what it made: the interpreter, in which they run, has none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# A folder with another version of Triton, the one of the GPU machines: `make triton36` makes it.
OTHER_TRITON = os.environ.get("POWERPLAN_TRITON_36")

needs_other_triton = pytest.mark.skipif(OTHER_TRITON is None, reason="POWERPLAN_TRITON_36 names no folder")


def run(*command: object, triton: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python, with the Triton in a folder if one is given."""
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        bare["PYTHONPATH"] = os.pathsep.join([triton, *filter(None, [bare.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, env=bare)
