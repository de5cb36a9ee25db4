"""One command line from its words to an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from powerplan.cli.app import application_for
from powerplan.cli.completion import VARIABLE, check_request
from powerplan.cli.say import error
from powerplan.cli.streams import abandon
from powerplan.errors import PowerplanError, on_command_line

INTERRUPTED = 130


def dispatch(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code. Every error is told in one line on stderr."""
    completes = bool(os.environ.get(VARIABLE))
    try:
        with on_command_line():
            if completes:
                check_request(os.environ)
            code = application_for(arguments)(args=arguments, prog_name="powerplan", standalone_mode=False)
        sys.stdout.flush()
    except PowerplanError as problem:
        error(str(problem))
        return problem.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (BrokenPipeError, SystemExit) as stop:
        # The reader (head, less) has gone, and there is nobody to tell. Where typer finds that, it ends the process.
        if isinstance(stop, BrokenPipeError) or isinstance(stop.__context__, BrokenPipeError):
            abandon(sys.stdout)
            return 0
        code = stop.code
    except OSError as problem:
        abandon(sys.stdout)
        error(f"{problem.filename or 'cannot write the result'}: {problem.strerror or problem}")
        return 4
    except MemoryError:
        error("out of memory")
        return 4
    except Exception as problem:
        usage = _usage_problem(problem)
        if usage is None:
            raise
        error(usage)
        return 2
    if code == INTERRUPTED:  # Typer catches KeyboardInterrupt and says nothing.
        error("interrupted")
    # Typer ends with 1 after what it has told itself, such as an unknown shell. For fish that is an answer: no words.
    return 2 if code == 1 and not completes else code if isinstance(code, int) else 0


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
