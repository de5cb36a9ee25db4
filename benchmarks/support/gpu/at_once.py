"""A plugin of pytest that prints each failure when it happens, and counts: a run that is stopped has no summary."""

from __future__ import annotations

import pytest

SHOWN = 1500
"""Characters of a failure that are printed, its last ones: the error and the line that it came from."""

EVERY = 20
"""Tests after which the counts are printed."""


class Counts:
    """Counts the reports of tests in the process that all of them come to."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the report of one test: of its setup, of itself, or of what comes after it."""
        if report.failed:
            self.failed += 1
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-SHOWN:]}\n{self}", flush=True)
        elif report.passed and report.when == "call":
            self.passed += 1
            if self.passed % EVERY == 0:
                print(f"\n{self}", flush=True)

    def __str__(self) -> str:
        return f"{self.passed} passed and {self.failed} failed so far"


def pytest_configure(config: pytest.Config) -> None:
    """Listen, but not in the workers of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Counts(), "counts at once")
