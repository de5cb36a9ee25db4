"""Calls that take the Hopper kernels which no GPU has run, in a process whose other calls take what is shipped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from powerplan.kernels.triton.support import UNTRIED_VARIABLE, takes_untried


@contextmanager
def untried(wanted: bool) -> Iterator[None]:
    """Let calls take them, or not, while the context lasts, whatever the environment says.

    A backward pass belongs into the context of its forward pass: it reads what that has saved.
    """
    before = os.environ.pop(UNTRIED_VARIABLE, None)
    if wanted:
        os.environ[UNTRIED_VARIABLE] = "all"
    _forget()
    try:
        yield
    finally:
        os.environ.pop(UNTRIED_VARIABLE, None)
        if before is not None:
            os.environ[UNTRIED_VARIABLE] = before
        _forget()


def _forget() -> None:
    """Let the variable be read again. The shape of a call remembers its engine."""
    takes_untried.cache_clear()
    shapes = sys.modules.get("powerplan.kernels.triton.shapes")
    if shapes is not None:
        shapes._launch_shape.cache_clear()
