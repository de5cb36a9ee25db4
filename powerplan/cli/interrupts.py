"""Ctrl-C and SIGTERM: they end the process at once, except within `kept`, where something would be lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from powerplan.errors import PowerplanError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalError(PowerplanError):
    """A signal ended the command. The exit code is that of shells: 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__("interrupted")
        self.exit_code = 128 + number


@dataclass
class Kept:
    """How a block of `kept` takes signals: they raise KeyboardInterrupt, but the first one after `wait` does not.

    Attributes:
        waiting: Whether the next signal waits, to be asked for as `waited`.
        waited: Whether one has waited.
        number: The last signal, if one came.
    """

    waiting: bool = False
    waited: bool = False
    number: int | None = None

    def wait(self) -> None:
        self.waiting = True

    def resume(self) -> None:
        self.waiting = False

    def take(self, number: int) -> None:
        self.number = number
        if self.waited or not self.waiting:
            raise KeyboardInterrupt
        self.waited = True


_kept: Kept | None = None


@contextmanager
def kept() -> Iterator[Kept]:
    """Let signals raise KeyboardInterrupt in the block, or wait, instead of ending the process.

    Raises SignalError in place of KeyboardInterrupt, which typer would turn into an exit code without a word.
    """
    global _kept
    _kept = block = Kept()
    try:
        yield block
    except KeyboardInterrupt:
        raise SignalError(block.number or signal.SIGINT) from None
    except PowerplanError:
        raise
    except Exception:
        if block.number is None:
            raise
        raise SignalError(block.number) from None  # Libraries turn KeyboardInterrupt into exceptions of their own.
    finally:
        _kept = None


def install() -> None:
    """Take charge of both signals. What the parent process has them ignore, as of a background job, stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)


@contextmanager
def installed() -> Iterator[None]:
    """Take charge of both signals inside a `with` block, as `install` does, and hand them back after it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    install()
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: no handler of Python's, which cannot be set again.
                signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    if _kept is None:
        _end(number)
    _kept.take(number)


def _end(number: int) -> NoReturn:
    """End the process, and not by an exception: libraries that are being imported swallow it, or raise another."""
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(SignalError(number).exit_code)
