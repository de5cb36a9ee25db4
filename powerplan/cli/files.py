"""The files that a command writes beside its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from powerplan.cli import say
from powerplan.cli.interrupts import Kept
from powerplan.errors import PowerplanError
from powerplan.output import write_whole


@dataclass(frozen=True)
class File:
    """A file to be written: the option that asks for it, its path (None where it was not given), and its content.

    remark: what is said once it is written, after "wrote PATH".
    """

    option: str
    path: str | None
    content: Callable[[], bytes]
    remark: str = ""


def deliver(show: Callable[[], None], files: Sequence[File], force: bool, signals: Kept) -> None:
    """Write `files`, call `show` to print the answer, and say what was written. No failure costs what else there is.

    The files come first: a reader of stdout that has gone (`| head -1`) must not cost them. Ctrl-C waits for them.

    Raises:
        PowerplanError: The first of what went wrong with a file.
        KeyboardInterrupt: A signal has waited.
    """
    notes: list[str] = []
    problems: list[PowerplanError] = []
    signals.wait()
    try:
        for file in files:
            if file.path is not None:
                try:
                    write_whole(file.path, file.content(), force, file.option)
                    notes.append(f"wrote {file.path}{file.remark}")
                except PowerplanError as problem:
                    problems.append(problem)
    finally:
        signals.resume()
        try:
            show()
        finally:
            for note in notes:
                say.note(note)
    if problems:
        raise problems[0]
    if signals.waited:
        raise KeyboardInterrupt
