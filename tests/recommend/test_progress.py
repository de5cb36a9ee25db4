"""A search that takes long says so on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys
import time

import pytest
from children import HUNG_S

from powerplan.cli.progress import at_work


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_a_terminal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    with at_work("comparing candidates", after=0):
        hung = time.monotonic() + HUNG_S
        while "comparing candidates" not in stream.getvalue() and time.monotonic() < hung:
            time.sleep(0.01)
    assert "comparing candidates" in stream.getvalue()


@pytest.mark.parametrize(("terminal", "after"), [(False, 0.0), (True, 1000.0)])
def test_others_and_short_searches_are_not(monkeypatch: pytest.MonkeyPatch, terminal: bool, after: float) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(ValueError, match="wrong"), at_work("comparing candidates", after):
        raise ValueError("wrong")
    assert stream.getvalue() == ""
