"""Lists as one types them: words, as "power,window", and settings, as "fsdp=8,cp=8"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from powerplan.errors import InputError, allowed_values, check_word, shown


def split_words(text: str) -> list[str]:
    """Return the parts of a text between commas, without the spaces around them."""
    return [word.strip() for word in text.split(",")]


def parse_words(words: str | Iterable[Any], allowed: Sequence[str], where: str) -> list[str]:
    """Return the words of a list, which is a text such as "power,window" or has them already, without repeats.

    Raises InputError for one that is not among `allowed`; the message begins with `where`.
    """
    several = split_words(words) if isinstance(words, str) else words
    found = list(several) if isinstance(several, Iterable) else [several]
    for word in found:
        check_word(word, allowed, where)
    return list(dict.fromkeys(found))


def parse_settings(text: str, names: Sequence[str], where: str, write: str, *, of: str = "a setting") -> dict[str, str]:
    """Return the values of settings such as "fsdp=8,cp=8", as text by their names, in their order.

    Args:
        text: name=value, with commas between them; spaces around names and values do not count.
        names: what may be set.
        where: what messages begin with.
        write: an example, for a message about a part that is no name=value.
        of: what messages call one of them.

    Raises:
        InputError: a part is no name=value, or a name is not among `names` or is given twice.
    """
    values: dict[str, str] = {}
    for part in split_words(text):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise InputError(f"{shown(part)} is not {of}; write {write}", where)
        if name not in names:
            raise InputError(f"{shown(name)} is not {of}{allowed_values(name, names)}", where)
        if name in values:
            raise InputError(f"{name} is given twice", where)
        values[name] = value
    return values
