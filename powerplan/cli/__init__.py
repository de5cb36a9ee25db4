"""The command line: parse, call one function, print. `main` is the only place that ends the process."""

from __future__ import annotations

import io
import os
import sys

import typer

from powerplan.cli.app import application_for
from powerplan.cli.say import error
from powerplan.errors import PowerplanError, on_command_line

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 4 cannot write, 130 interrupted."""
    try:
        with on_command_line():
            app = application_for(sys.argv[1:] if arguments is None else arguments)
            code = app(args=arguments, prog_name="powerplan", standalone_mode=False)
        sys.stdout.flush()
    except PowerplanError as problem:
        error(str(problem))
        return problem.exit_code
    except (KeyboardInterrupt, typer.Abort):
        error("interrupted")
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as stop:
        # The reader (head, less) has gone, and there is nobody to tell. Where typer finds that, it ends the process.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, BrokenPipeError):
            raise
        _abandon_stdout()
        return 0
    except OSError as problem:
        _abandon_stdout()
        error(f"cannot write the result: {problem.strerror}")
        return 4
    except Exception as problem:
        usage = _usage_problem(problem)
        if usage is None:
            raise
        error(usage)
        return 2
    if code == INTERRUPTED:  # From typer, which may catch Ctrl-C itself, or from a command that kept what it had.
        error("interrupted")
    return code if isinstance(code, int) else 0


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


def _abandon_stdout() -> None:
    """Point stdout at the null device, as Python flushes it once more at its end and cannot write what is left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    """Entry point of the `powerplan` script."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # None where closed (>&-).
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal of few characters gets escapes, not a traceback.
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
