"""What ended a command, in one line and an exit code. The examples of the repository end so, too."""

from __future__ import annotations

import sys

from powerplan.cli.say import error
from powerplan.cli.streams import abandon
from powerplan.errors import PowerplanError


def told(problem: Exception) -> int | None:
    """Say on stderr what ended a command, and return the exit code; None for an exception that is a defect."""
    match problem:
        case PowerplanError():
            error(str(problem))
            return problem.exit_code
        case BrokenPipeError():  # The reader (head, less) has gone, and there is nobody to tell.
            abandon(sys.stdout)
            return 0
        case OSError():
            abandon(sys.stdout)
            error(f"{problem.filename or 'cannot write the result'}: {problem.strerror or problem}")
            return 4
        case MemoryError():
            error("out of memory")
            return 4
    return None
