"""Triton's kernels run in its interpreter, but for runs on a GPU (device.py); hypothesis asks for no speed."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

if os.environ.get("POWERPLAN_TEST_DEVICE", "cpu") == "cpu":
    # Triton reads it when it is imported and when a kernel is defined, so here, before any test is collected.
    os.environ["TRITON_INTERPRET"] = "1"

if find_spec("hypothesis") is not None:  # The GPU machines of `make gpu` need not have it.
    from hypothesis import HealthCheck, settings

    # How long an example takes, or making one, is a matter of what else the machine does.
    slow = [HealthCheck.too_slow]
    settings.register_profile("no clock", settings.default, deadline=None, suppress_health_check=slow)
    settings.load_profile("no clock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests that share a fixture of their file go to one worker of pytest-xdist: it is made once (loadgroup)."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        found = item._fixtureinfo.name2fixturedefs.values()
        shared = [one for several in found for one in several if one.scope == "module" and one.baseid == file]
        if any(one.argname in item.fixturenames and not one.argname.startswith("_") for one in shared):
            item.add_marker(pytest.mark.xdist_group(file))
