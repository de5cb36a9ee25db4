"""The command line: parse, call one function, print. `main` is the only place that ends the process."""

from __future__ import annotations

import io
import os
import re
import sys

import typer

from powerplan.cli.app import app
from powerplan.cli.say import error
from powerplan.errors import PowerplanError, allowed_values

# click's ClickException, wherever it lives: typer brought its own copy of click with 0.26.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 4 cannot write, 130 interrupted."""
    try:
        code = app(args=arguments, prog_name="powerplan", standalone_mode=False)
        sys.stdout.flush()
    except PowerplanError as problem:
        error(str(problem))
        return problem.exit_code
    except _UsageError as problem:
        context = getattr(problem, "ctx", None)
        command = context.command_path if context else "powerplan"
        error(f"{_usage(problem.format_message())} ({command} --help)")  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        error("interrupted")
        return 130
    except BrokenPipeError:
        _abandon_stdout()  # The reader (head, less) has gone, and there is nobody to tell.
        return 0
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        _abandon_stdout()  # typer ends the process itself where its commands or its help find the reader gone.
        return 0
    except OSError as problem:
        _abandon_stdout()
        error(f"cannot write the result: {problem.strerror}")
        return 4
    return code if isinstance(code, int) else 0


_CHOICE = re.compile(
    r"Invalid value for '?(.+?)'?: (?:Value error, )?('.*'|\".*\") is not (?:one of )?('.*')\.?", re.DOTALL
)


def _usage(message: str) -> str:
    """Return click's message; for a word that is not among the choices, as all other messages of powerplan say it."""
    if not (match := _CHOICE.fullmatch(message)):
        return message.rstrip(".")
    option, value, choices = match[1], match[2], re.findall(r"'([^']*)'", match[3])
    return f"{option}: {value} is not known{allowed_values(value[1:-1], choices)}"


def _abandon_stdout() -> None:
    """Let Python's last flush go nowhere: what is left in the buffer cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    """Entry point of the `powerplan` script."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # None where closed (>&-).
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal of few characters gets escapes, not a traceback.
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
