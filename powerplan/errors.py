"""Every error that powerplan raises on purpose. The CLI prints the message and exits with `exit_code`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PowerplanError(Exception):
    """Root of the tree: its message is meant for the user, whole and without a traceback."""

    exit_code = 1


class InputError(PowerplanError, ValueError):
    """Bad usage or bad input: a file, a value, a name.

    `where` is the place in the input ("model.yaml:7:13" or "--ctx"), or None where there is none.
    """

    exit_code = 2

    def __init__(self, problem: str, where: str | None = None) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.problem = problem
        self.where = where


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return up to `count` entries of `known` most like `word`: first what begins with it, then by spelling."""
    by_folded: dict[str, str] = {}
    for candidate in known:
        by_folded.setdefault(candidate.casefold(), candidate)
    folded = word.casefold()
    longer = sorted((name for name in by_folded if len(folded) > 2 and name.startswith(folded)), key=len)
    close = difflib.get_close_matches(folded, by_folded, n=count, cutoff=cutoff)
    return [by_folded[match] for match in dict.fromkeys((*longer, *close))][:count]


def did_you_mean(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """Return "; did you mean a, b or c?" for the nearest spellings, or "" where nothing is near."""
    names = nearest(word, known, count, cutoff)
    if not names:
        return ""
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return f"; did you mean {listed}?"


def shown(value: object, limit: int = 60) -> str:
    """Return repr(value), cut to `limit` characters: a message quotes the input, it does not reprint it."""
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4,300 digits has no decimal repr in CPython 3.11+
        text = "a number of thousands of digits"
    return text if len(text) <= limit else text[: limit - 3] + "..."
