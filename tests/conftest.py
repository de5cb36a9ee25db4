"""Triton's kernels run in its interpreter, but for runs on a GPU (device.py)."""

from __future__ import annotations

import os

if os.environ.get("POWERPLAN_TEST_DEVICE", "cpu") == "cpu":
    # Triton reads it when it is imported and when a kernel is defined, so here, before any test is collected.
    os.environ["TRITON_INTERPRET"] = "1"
