"""Child processes of tests: how long one may run before it counts as hung, and one that Ctrl-C reaches."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HUNG_S = 1800.0
"""Seconds after which a process counts as hung: far more than any takes, however busy the machine is."""

WITH_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A child inherits an ignored SIGINT, as a suite has it that was started as a background job."""


@contextmanager
def interruptible(command: Sequence[str | Path]) -> Iterator[subprocess.Popen[str]]:
    """Start a command that SIGINT reaches, with pipes for its output. It is killed at the end, or after HUNG_S."""
    ready = [sys.executable, "-c", WITH_CTRL_C, *map(str, command)]
    with subprocess.Popen(ready, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        hung = threading.Timer(HUNG_S, process.kill)
        hung.start()
        try:
            yield process
        finally:
            hung.cancel()
            process.kill()
