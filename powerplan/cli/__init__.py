"""The command line: parse, call one function, print. `main` is the only place that ends the process."""

from __future__ import annotations

import os
import sys

import typer

from powerplan.cli.app import app
from powerplan.cli.say import error
from powerplan.errors import PowerplanError

# click's ClickException, wherever it lives: typer brought its own copy of click with 0.26.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad usage or input, 130 interrupted."""
    try:
        code = app(args=arguments, prog_name="powerplan", standalone_mode=False)
        sys.stdout.flush()
    except PowerplanError as problem:
        error(str(problem))
        return problem.exit_code
    except _UsageError as problem:
        context = getattr(problem, "ctx", None)
        command = context.command_path if context else "powerplan"
        error(f"{problem.format_message()} ({command} --help)")  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        error("interrupted")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would report the failed flush at exit; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def run() -> None:
    """Entry point of the `powerplan` script."""
    sys.exit(main())
