"""Sizes as people write them (64k, 1M), and numbers as people read them (247.1M, 36 MiB, 1:4.89)."""

from __future__ import annotations

import re
from fractions import Fraction

from powerplan.errors import InputError, shown

MAX_CONTEXT = 2**50
"""Longest context accepted, in tokens: far past any machine, and still exact as a float."""

_CONTEXT = re.compile(
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)(?P<suffix>[kKmMgG]?)"
)
_LONGEST = 100
"""Characters of a size: Python refuses to read a number of thousands of digits."""
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def parse_context(text: str, where: str | None = None) -> int:
    """Return a context length in tokens from "65536", "64k" (65,536), "1M" (1,048,576) or "1e6".

    Suffixes k, M and G are powers of 1,024, in either case. Raises InputError for anything else, for a
    fraction of a token, for 0, and past 2^50.
    """
    match = _CONTEXT.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None:
        raise InputError(f"{shown(text)} is not a size in tokens; write 65536, 64k (=65536) or 1M (=1048576)", where)
    number = match["number"].replace("_", "").replace(",", "")
    size = Fraction(number) * _BINARY[match["suffix"].lower()]
    if size.denominator != 1:
        raise InputError(f"{shown(text)} is not a whole number of tokens", where)
    if not 1 <= size <= MAX_CONTEXT:
        raise InputError(f"{shown(text)} is out of range; a context is 1 to {MAX_CONTEXT:,} tokens (2^50)", where)
    return int(size)


def parse_contexts(text: str, where: str | None = None) -> list[int]:
    """Return the sizes of a list such as "1k,8k,64k", in its order and without repeats.

    "65,536" is refused: it reads as one context with a thousands separator, and as the two contexts 65 and 536.
    """
    if re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", text.strip()):
        whole = text.strip().replace(",", "")
        raise InputError(
            f"{shown(text)} could be one context or several; write {whole}, or put spaces after commas", where
        )
    sizes = [parse_context(part, where) for part in text.split(",")]
    return list(dict.fromkeys(sizes))


def parse_integers(text: str, where: str, low: int, high: int) -> list[int]:
    """Return the integers of a list such as "2,3,4", each within low..high, in order, without repeats."""
    write = "write a number or a list such as 2,3,4"
    return list(dict.fromkeys(_integer(part, where, low, high, write) for part in text.split(",")))


def parse_integer(text: str, where: str, low: int, high: int) -> int:
    """Return one integer within low..high."""
    return _integer(text, where, low, high, f"write one from {low:,} to {high:,}")


def _integer(text: str, where: str, low: int, high: int, write: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,4000}", text.strip()):
        raise InputError(f"{shown(text)} is not an integer; {write}", where)
    number = int(text)
    if not low <= number <= high:
        raise InputError(f"{shown(number)} is out of range; allowed are {low:,} to {high:,}", where)
    return number


def json_number(value: int | Fraction) -> int | float:
    """Return an exact integer where the value is one, else the nearest float."""
    if isinstance(value, Fraction):
        return value.numerator if value.denominator == 1 else float(value)
    return value


def format_count(value: int | Fraction) -> str:
    """Return a count with a decimal suffix and four figures: 247.1M, 1.208G, 999."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E", "Z", "Y"), "")


def format_parameters(value: int) -> str:
    """Return a parameter count as model cards write it: 124.4M, 8.030B, 1.026T."""
    return _scaled(value, 1000, ("", "k", "M", "B", "T", "P", "E", "Z", "Y"), "")


def format_bytes(value: int | Fraction) -> str:
    """Return bytes with a binary suffix: 36 MiB, 8.5 GiB."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"), " ")


def _scaled(value: int | Fraction, base: int, suffixes: tuple[str, ...], gap: str) -> str:
    """Four figures and the first suffix that leaves fewer than `base` of it."""
    for exponent, suffix in enumerate(suffixes):
        rounded = float(f"{float(Fraction(value) / base**exponent):.4g}")
        if rounded < base or suffix == suffixes[-1]:
            return f"{rounded:,.10g}{gap}{suffix}"
    raise AssertionError("the last suffix always fits")


def format_ratio(ratio: Fraction) -> str:
    """Return a weight-state FLOP ratio as 13.1:1 or 1:4.89, three figures on the heavy side."""
    if ratio >= 1:
        return f"{_three(ratio)}:1"
    return f"1:{_three(1 / ratio)}"


def _three(value: Fraction) -> str:
    text = f"{float(value):.3g}"
    if "e" in text or float(text) >= 100:
        return f"{round(value):,}"
    return text
