"""The errors that powerplan raises on purpose, and the parts of their messages.

The command line prints the message and exits with `exit_code`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar


class PowerplanError(Exception):
    """The base of all errors of powerplan. Its message is written for the user and needs no traceback."""

    exit_code = 1

    def __init__(self, problem: str) -> None:
        super().__init__(one_line(problem))


class InputError(PowerplanError, ValueError):
    """A file, a value or a name that powerplan cannot use.

    The message is one line without control characters, whatever the input holds.

    Args:
        problem: what is wrong, and what is allowed instead.
        where: the place in the input, such as "model.yaml:7:13", "--ctx" or "context"; None where there is none.
    """

    exit_code = 2

    def __init__(self, problem: str, where: str | None = None) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.problem = problem
        self.where = where


class InfeasibleError(PowerplanError):
    """No plan meets all constraints. The message names the constraint that binds, and by how much it is missed."""

    exit_code = 3


class MachineError(PowerplanError):
    """This machine cannot do what was asked: a package is not installed, or there is too little memory."""

    exit_code = 4


_on_command_line: ContextVar[bool] = ContextVar("on_command_line", default=False)

_OPTIONS = {"context": "--ctx", "model": "MODEL", "stages": "--stage", "trainer": "--export", "unknown": "--solve"}
"""How the command line spells parameters that its options do not have the names of."""


@contextmanager
def on_command_line() -> Iterator[None]:
    """Let messages inside a `with` block name options where they would name parameters."""
    token = _on_command_line.set(True)
    try:
        yield
    finally:
        _on_command_line.reset(token)


def parameter(name: str, value: str | None = None) -> str:
    """Return a parameter as the user writes it, with a value where one is given.

    In Python that is gpu_hours and gpu='h100-sxm', on the command line --gpu-hours and --gpu h100-sxm.
    """
    if not _on_command_line.get():
        return name if value is None else f"{name}={value!r}"
    option = _OPTIONS.get(name) or f"--{name.replace('_', '-')}"
    return option if value is None else f"{option} {value}"


MAX_WORD = 100
"""Longest word, in characters, that could be a misspelt name; the comparison is quadratic in it."""


def did_you_mean(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """Return "; did you mean a, b or c?", first what begins with `word`, then by spelling; "" where nothing is near."""
    if len(word) > MAX_WORD:
        return ""
    by_folded: dict[str, str] = {}
    for candidate in known:
        by_folded.setdefault(candidate.casefold(), candidate)
    folded = word.casefold()
    longer = sorted((name for name in by_folded if len(folded) > 2 and name.startswith(folded)), key=len)
    import difflib  # Only a mistake needs it.

    close = difflib.get_close_matches(folded, by_folded, n=count, cutoff=cutoff)
    names = [by_folded[match] for match in dict.fromkeys((*longer, *close))][:count]
    return f"; did you mean {listed(names, 'or')}?" if names else ""


def listed(names: Sequence[str], word: str) -> str:
    """Return names as a sentence lists them: "a, b or c" where `word` is "or"."""
    return f" {word} ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def allowed_values(word: object, allowed: Sequence[str]) -> str:
    """Return the end of a message about `word`: "; did you mean a? allowed are a, b", or "; allowed are a, b"."""
    near = did_you_mean(word, allowed) if isinstance(word, str) else ""
    return f"{near or ';'} allowed are {', '.join(allowed)}"


def unknown_word(word: object, allowed: Sequence[str]) -> str:
    """Return what is wrong with `word`, which is none of the `allowed` ones: "'b' is not known; allowed are a, c"."""
    return f"{shown(word)} is not known{allowed_values(word, allowed)}"


def check_word(word: object, allowed: Sequence[str], where: str | None = None) -> None:
    """Raise InputError unless `word` is one of `allowed`; the message begins with `where`."""
    if word not in allowed:
        raise InputError(unknown_word(word, allowed), where)


def shown(value: object, limit: int = 60) -> str:
    """Return a value of the input as a message quotes it, cut to about `limit` characters."""
    text = ""
    for piece in _pieces(value, limit):
        text += piece
        if len(text) > limit:
            return text[: limit - 3] + "..."
    return text


def _pieces(value: object, limit: int) -> Iterator[str]:
    """Yield the text of a value piece by piece, as aliases let a small YAML file describe a value of any size."""
    if isinstance(value, str):
        text = repr(value[: limit + 1])
        yield text if len(text) <= limit else f"{text[: limit - 4]}...{text[-1]}"
    elif value is None or isinstance(value, bool):
        yield "null" if value is None else str(value).lower()
    elif isinstance(value, dict):
        yield "{"
        for index, (key, inner) in enumerate(value.items()):
            yield f"{', ' if index else ''}{str(key)[:limit]}: "
            yield from _pieces(inner, limit)
        yield "}"
    elif isinstance(value, (list, tuple)):
        yield "["
        for index, inner in enumerate(value):
            yield ", " if index else ""
            yield from _pieces(inner, limit)
        yield "]"
    else:
        try:
            yield repr(value)
        except ValueError:  # an int of more than 4,300 digits has no decimal repr in CPython 3.11+
            yield "a number of thousands of digits"


_HOSTILE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move a terminal's cursor, break a line, turn the writing direction, or cannot be encoded."""


def hostile_characters(text: str) -> list[str]:
    """Return the characters of `text` that must not reach a terminal, in their order."""
    return _HOSTILE.findall(text)


def printable(text: str) -> str:
    """Return `text` with every character that does not print written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


LONGEST_LINE = 2000
"""The most characters of a message."""


def one_line(text: str) -> str:
    """Return `text` as `printable` has it. A text of more than LONGEST_LINE characters loses its middle."""
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 2 :]}"
    return printable(text)
