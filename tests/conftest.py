"""Triton's kernels run in its interpreter, but for runs on a GPU (device.py); hypothesis asks for no speed."""

from __future__ import annotations

import gc
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


# What is imported and collected stays to the end. Looking through it for garbage, again and again, took a third of the
# time of collecting and a sixth of that of tests.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Extension modules report what is left at the end.


SHARED = ('@pytest.fixture(scope="module")', "\n@cache\n")
"""What a test file has in it whose tests share work."""


@cache
def shares_work(file: str) -> bool:
    text = (Path(__file__).resolve().parent.parent / file).read_text(encoding="utf-8")
    return any(words in text for words in SHARED)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let `pytest -n` make what tests of a file share once: one worker has all of them. Others go where room is.

    xdist's own way, marks of groups, does nothing with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares_work(file) else nodeid

    return ByFile(config, log) if config.getvalue("dist") == "load" else None
