"""A progress bar on stderr, on a terminal only: what runs now, and how much of the time limit has passed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from powerplan.cli.say import coloured


@contextmanager
def progress_bar(seconds: float) -> Iterator[Callable[[str, float], None]]:
    """Yield a function that shows what runs now and the share of `seconds` that has passed; silent off a terminal."""
    if not sys.stderr.isatty():
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
