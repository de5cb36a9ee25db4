"""One command line from its words to an exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import typer

from powerplan.cli.app import application_for
from powerplan.cli.completion import VARIABLE, requested
from powerplan.cli.endings import told
from powerplan.cli.say import error, plain
from powerplan.cli.streams import abandon, columns
from powerplan.errors import on_command_line
from powerplan.report.width import terminal

INTERRUPTED = 130


def dispatch(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code. Every error is told in one line on stderr."""
    try:
        return _exit_code(arguments)
    finally:
        try:  # Beside an error there may be an answer; Python itself would end with 120 where it cannot be written.
            sys.stdout.flush()
        except OSError:
            abandon(sys.stdout)


def _exit_code(arguments: Sequence[str]) -> int:
    completes = bool(os.environ.get(VARIABLE))
    try:
        answering = requested() if completes else nullcontext()
        with plain(arguments), on_command_line(), terminal(columns()), answering:
            code = _called(arguments)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as problem:
        ended = told(problem)
        if ended is not None:
            return ended
        usage = _usage_problem(problem)
        if usage is None:
            raise
        error(usage)
        return 2
    if code == INTERRUPTED:  # Typer catches KeyboardInterrupt and says nothing.
        error("interrupted")
    # Typer ends with 1 after what it has told itself, such as an unknown shell. For fish that is an answer: no words.
    return 2 if code == 1 and not completes else code if isinstance(code, int) else 0


def _current(argument: str) -> str:
    """Return an argument as it is spelt now: --gpu has been --hardware."""
    return re.sub(r"^--hardware(?=$|=)", "--gpu", argument)


def _called(arguments: Sequence[str]) -> object:
    """Return what typer returns, also where it ends the process: after completion, and where a reader has gone."""
    try:
        return application_for(arguments)(
            args=[*map(_current, arguments)], prog_name="powerplan", standalone_mode=False
        )
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        return stop.code


def _usage_problem(problem: Exception) -> str | None:
    """Return what click says about a command line that it cannot read; None for any other exception.

    Click's exceptions are known by their method `format_message`: no class of them is public in every typer since
    0.15, as some versions depend on click and others bring a copy of it.
    """
    message = getattr(problem, "format_message", None)
    if message is None:
        return None
    context = getattr(problem, "ctx", None)
    return f"{message().rstrip('.')} ({context.command_path if context else 'powerplan'} --help)"
