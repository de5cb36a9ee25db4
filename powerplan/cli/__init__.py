"""The command line: parse, call one function, print. `main` is the only place that turns errors into exit codes.

This module imports nothing of powerplan at its top: `run` is in charge of Ctrl-C before the rest is loaded.
"""

from __future__ import annotations

import os
import sys


def run() -> None:
    """Entry point of the `powerplan` script."""
    try:
        from powerplan.cli import interrupts

        interrupts.install()
        from powerplan.cli import streams

        streams.prepare()
        code = main()
    except KeyboardInterrupt:  # Before the handlers stand; later they end the process, or `main` catches it.
        try:  # noqa: SIM105 - contextlib would be one more import before this block
            os.write(2, b"error: interrupted\n")
        except OSError:
            pass
        code = 130
    sys.exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 3 nothing fits, 4 cannot, 130 interrupted."""
    from powerplan.cli.dispatch import dispatch

    return dispatch(sys.argv[1:] if arguments is None else arguments)
