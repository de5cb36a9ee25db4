"""Progress on stderr, on a terminal only: what runs now, and how much of a time limit has passed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING

from powerplan.cli.say import coloured, quiet

if TYPE_CHECKING:
    from rich.progress import Progress


LONG_S = 1.0
"""Seconds after which a command that answers says that it is at work."""


@contextmanager
def at_work(text: str, after: float = LONG_S) -> Iterator[None]:
    """Show `text` and the time that has passed, from `after` seconds on and until the end; silent off a terminal."""
    if quiet() or not sys.stderr.isatty():
        yield
        return
    bars: list[Progress] = []

    def show() -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True, no_color=not coloured(sys.stderr))
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        bar = Progress(*columns, console=console, transient=True, refresh_per_second=4)
        bars.append(bar)
        bar.add_task(text, total=None)
        bar.start()

    timer = Timer(after, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        for bar in bars:
            bar.stop()


@contextmanager
def progress_bar(seconds: float) -> Iterator[Callable[[str, float], None]]:
    """Yield a function that shows what runs now and the share of `seconds` that has passed; silent off a terminal."""
    if quiet() or not sys.stderr.isatty():
        yield lambda text, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, no_color=not coloured(sys.stderr))
    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(24), TimeElapsedColumn(), TextColumn(f"of {seconds:,.0f} s"), text)
    # Redrawn only twice a second: drawing takes time from what is measured.
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)
