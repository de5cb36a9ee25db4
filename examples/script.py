"""How the examples start and end: usage, and one line with an exit code where something is wrong, as `powerplan` does.

Exit codes: 0 done, 2 bad input, 4 this machine cannot (a package is missing), 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from typing import NoReturn

INSTALLED_BY = {"powerplan": ".", "transformers": "'transformers>=5.5'"}
"""What pip installs for a package, where that is not its name: powerplan comes from the folder above this one."""


@contextmanager
def imports() -> Iterator[None]:
    """Let the imports in a `with` block end the script in one line where a package is missing, and at Ctrl-C."""
    try:
        from powerplan.cli import interrupts

        with interrupts.installed():
            yield
    except (ImportError, OSError) as error:  # OSError: a library that a package loads by its path.
        print(f"error: {_missing(error)}", file=sys.stderr)
        sys.exit(4)


def _missing(error: ImportError | OSError) -> str:
    """Return why an import failed. An ImportError of powerplan says it in full."""
    package = ((error.name if isinstance(error, ImportError) else None) or "").partition(".")[0]
    if package and find_spec(package) is None:
        return (
            f"this example needs {package}, and it is not installed: pip install {INSTALLED_BY.get(package, package)}"
        )
    return f"{package} does not load: {error}" if package else str(error)


def run(main: Callable[..., None], usage: str | None) -> NoReturn:
    """Call `main` with the words of the command line, and end the script.

    Args:
        main: It takes texts, all of them with defaults, and prints.
        usage: What --help prints.
    """
    from powerplan.cli import interrupts

    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(usage)
        sys.exit()
    most = len(signature(main).parameters)
    with interrupts.installed():
        from powerplan.cli.endings import told
        from powerplan.errors import InputError

        try:
            with interrupts.kept():
                if len(words) > most:
                    raise InputError(f"{words[most]!r} is one argument too many; --help says which there are")
                main(*words)
                sys.stdout.flush()
        except Exception as problem:
            code = told(problem)
            if code is None:
                raise
            sys.exit(code)
    sys.exit()
