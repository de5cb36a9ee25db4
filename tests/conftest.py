"""Triton's kernels run in its interpreter, but for runs on a GPU (device.py); hypothesis asks for no speed."""

from __future__ import annotations

import os
from importlib.util import find_spec

if os.environ.get("POWERPLAN_TEST_DEVICE", "cpu") == "cpu":
    # Triton reads it when it is imported and when a kernel is defined, so here, before any test is collected.
    os.environ["TRITON_INTERPRET"] = "1"

if find_spec("hypothesis") is not None:  # The GPU machines of `make gpu` need not have it.
    from hypothesis import HealthCheck, settings

    # How long an example takes, or making one, is a matter of what else the machine does.
    slow = [HealthCheck.too_slow]
    settings.register_profile("no clock", settings.default, deadline=None, suppress_health_check=slow)
    settings.load_profile("no clock")
