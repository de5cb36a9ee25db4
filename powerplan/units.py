"""Numbers as people write them (64k, 1M) and read them (247.1M, 36 MiB, 1:4.89), each with its unit.

Every function that parses raises InputError for any other text, and for a number out of range. Its message begins with
`where`, the option or the place in a file.
"""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import Any, SupportsIndex

from powerplan.errors import InputError, shown

MAX_CONTEXT = 2**50
"""Longest context that is accepted, in tokens. It is far beyond any machine, and still exact as a float."""

_CONTEXT = re.compile(
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)(?P<suffix>[kKmMgG]?)"
)
_LONGEST = 100
"""Longest text of a number, in characters: Python refuses to read a number of thousands of digits."""
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def _matched(pattern: re.Pattern[str], text: str, where: str | None, wanted: str) -> re.Match[str]:
    """Return the match of a whole text; where there is none, the error says what was wanted."""
    match = pattern.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None:
        raise InputError(f"{shown(text)} is not {wanted}", where)
    return match


def parse_context(text: str, where: str | None = None, of: str = "a context") -> int:
    """Return a context in tokens, 1 to 2^50, from "65536", "64k" (65,536), "1M" or "1e6"; k, M, G: powers of 1,024.

    of: what the message calls a size that is out of range.
    """
    match = _matched(_CONTEXT, text, where, "a size in tokens; write 65536, 64k (=65536) or 1M (=1048576)")
    number = match["number"].replace("_", "").replace(",", "")
    size = Fraction(number) * _BINARY[match["suffix"].lower()]
    if size.denominator != 1:
        raise InputError(f"{shown(text)} is not a whole number of tokens", where)
    if not 1 <= size <= MAX_CONTEXT:
        raise InputError(f"{shown(text)} is out of range; {of} is 1 to {MAX_CONTEXT:,} tokens (2^50)", where)
    return int(size)


def context_text(context: int) -> str:
    """Return a context as one types it: "64k", "1M", or "13403"; `parse_context` reads it."""
    for suffix, size in (("M", 2**20), ("k", 2**10)):
        if context % size == 0:
            return f"{context // size}{suffix}"
    return str(context)


def integer_of(value: Any) -> int | None:
    """Return an integer of any type as an int: of numpy, of torch, with `__index__`; None for all else and for a bool.

    An array or a tensor without dims counts as what it holds.
    """
    plain = value.tolist() if hasattr(value, "tolist") else value  # torch's bools have an __index__ too.
    if isinstance(plain, bool):
        return None
    try:
        return operator.index(plain)
    except TypeError:
        return None


def context_of(value: SupportsIndex | str, where: str | None = None, of: str = "a context") -> int:
    """Return a context in tokens, 1 to 2^50, from an integer of any type, or from a text such as "64k" (65,536).

    of: what messages call it.
    """
    if isinstance(value, str):
        return parse_context(value, where, of)
    tokens = integer_of(value)
    if tokens is None:
        raise InputError(f"{shown(value)} is not {of}; write tokens, as 65536 or '64k'", where)
    if not 1 <= tokens <= MAX_CONTEXT:
        raise InputError(f"{of} is 1 to {MAX_CONTEXT:,} tokens, and is {shown(tokens)}", where)
    return tokens


def parse_contexts(text: str, where: str | None = None) -> list[int]:
    """Return the sizes of a list such as "1k,8k,64k", in its order and without repeats.

    "65,536" is refused, as it could be one context with a thousands separator or the two contexts 65 and 536.
    """
    for piece in re.split(r",\s+", text.strip()):
        if not re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", piece):
            continue
        whole = piece.replace(",", "")
        advice = f"could be one context or several; write {whole}, or put spaces after commas"
        raise InputError(f"{shown(text)} {advice}", where)
    return list(dict.fromkeys(parse_context(part.strip(), where) for part in text.split(",")))


def parse_integers(text: str, where: str, low: int, high: int) -> list[int]:
    """Return the integers of a list such as "2,3,4", each within low..high, in order, without repeats."""
    write = "write a number or a list such as 2,3,4"
    return list(dict.fromkeys(_integer(part.strip(), where, low, high, write) for part in text.split(",")))


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


_COUNT = re.compile(r"(?P<number>[0-9]+(?:[,_][0-9]{3})*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)(?P<suffix>[kKMmGBbTtPE]?)")
_DECIMAL = {"": 0, "k": 3, "m": 6, "g": 9, "b": 9, "t": 12, "p": 15, "e": 18}
MAX_COUNT = 10**40
"""Largest count of FLOPs or tokens that is accepted. All computing on earth so far took about 10^29 FLOPs."""


def parse_count(text: str, where: str | None = None, of: str = "a count") -> int:
    """Return a count, 1 to 10^40, from "1e21", "300B" (3e11) or "1.5T". Suffixes k to E are powers of 1,000."""
    match = _matched(_COUNT, text, where, f"{of}; write 1e21, 300B (=3e11) or 1.5T")
    number = Fraction(match["number"].replace("_", "").replace(",", "")) * 10 ** _DECIMAL[match["suffix"].lower()]
    if number.denominator != 1:
        raise InputError(f"{shown(text)} is not a whole number", where)
    if not 1 <= number <= MAX_COUNT:
        raise InputError(f"{shown(text)} is out of range; allowed are 1 to 1e40", where)
    return int(number)


def parse_hours(text: str, where: str | None = None) -> Fraction:
    """Return hours from "1000", "0.5", "2.5k" or "1.2M" (decimal)."""
    if len(text) < 30 and re.fullmatch(r"[0-9]+\.[0-9]+", text) and Fraction(text) > 0:
        return Fraction(text)
    return Fraction(parse_count(text, where, "a number of hours"))


_BYTES = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s?(?P<unit>[kMGTP]i?B|[kMGTP]i?|B|)", re.IGNORECASE)


def parse_bytes(text: str, where: str | None = None) -> int:
    """Return bytes, 1 to 2^80, from "512MiB" or "512M" (binary), "2GB" (decimal) or "536870912"; rounded down."""
    match = _matched(_BYTES, text, where, "a size in bytes; write 512MiB, 2GB (=2e9) or 1048576")
    unit = match["unit"].lower()
    base = 1000 if len(unit) == 2 and unit[1] == "b" else 1024
    exponent = "kmgtp".find(unit[0]) + 1 if unit and unit != "b" else 0
    size = int(Fraction(match["number"]) * base**exponent)
    if not 1 <= size <= 2**80:
        raise InputError(f"{shown(text)} is out of range; allowed are 1 byte to 2^80", where)
    return size


_SECONDS = re.compile(r"(?P<number>[0-9]{1,7}(?:\.[0-9]{1,6})?)\s?(?P<unit>s|min|h|)")


def parse_seconds(text: str, where: str | None = None) -> float:
    """Return seconds from "90", "90s", "5min" or "1.5h", 1 second to a day."""
    match = _matched(_SECONDS, text, where, "a time; write 90 (seconds), 5min or 1h")
    seconds = float(match["number"]) * {"": 1, "s": 1, "min": 60, "h": 3600}[match["unit"]]
    if not 1 <= seconds <= 86400:
        raise InputError(f"{shown(text)} is out of range; allowed are 1 s to 24 h", where)
    return seconds


_RATIO = re.compile(r"(?P<weight>[0-9]{1,9}(?:\.[0-9]{1,9})?):(?P<state>[0-9]{1,9}(?:\.[0-9]{1,9})?)")


def parse_ratio(text: str, where: str | None = None) -> Fraction:
    """Return a weight-state FLOP ratio from "1:1", "3:1" or "1:2.5"; both sides are more than 0."""
    match = _matched(_RATIO, text, where, "a ratio; write 1:1, 3:1 or 1:2.5 (weight to state)")
    weight, state = Fraction(match["weight"]), Fraction(match["state"])
    if not weight or not state:
        raise InputError(f"{shown(text)} has a side of 0; both sides of a ratio are more than 0", where)
    return weight / state


_SHARE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(%?)")


def parse_share(text: str, where: str | None = None, *, or_none: bool = False) -> Fraction:
    """Return a share from "0.4" or "40%", more than 0 and at most 1; with `or_none` 0 is one too."""
    match = _matched(_SHARE, text, where, "a share; write 0.4 or 40%")
    share = Fraction(match[1]) / (100 if match[2] else 1)
    if not 0 <= share <= 1 or not (share or or_none):
        allowed = "from 0 to 1 (100%)" if or_none else "more than 0 and at most 1 (100%)"
        raise InputError(f"{shown(text)} is out of range; a share is {allowed}", where)
    return share


_DECIMAL_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


def parse_money(text: str, where: str | None = None) -> Fraction:
    """Return an amount of money from "2.50" or "3", 0 to 10^9, in whatever currency."""
    return Fraction(_matched(_DECIMAL_NUMBER, text, where, "an amount of money; write 2.50")[0])


def parse_rate(text: str, where: str | None = None) -> float:
    """Return a rate in GB/s from "50" or "12.5", more than 0."""
    rate = float(_matched(_DECIMAL_NUMBER, text, where, "a rate; write GB/s, as 50")[0])
    if not rate:
        raise InputError(f"{shown(text)} is out of range; a rate is more than 0", where)
    return rate


def parse_days(text: str, where: str | None = None) -> Fraction:
    """Return days from "30" or "1.5", more than 0."""
    days = Fraction(_matched(_DECIMAL_NUMBER, text, where, "a number of days; write 30 or 1.5")[0])
    if not days:
        raise InputError(f"{shown(text)} is out of range; allowed is more than 0", where)
    return days


def json_number(value: int | Fraction) -> int | float:
    """Return an exact integer where the value is one, else the nearest float."""
    return value.numerator if value.denominator == 1 else float(value)


def format_count(value: int | Fraction) -> str:
    """Return a count with a decimal suffix and four figures: 247.1M, 1.208G, 999."""
    return _scaled(value, 1000, _PREFIXES, "")


def format_quantity(value: int | Fraction, unit: str) -> str:
    """Return a quantity with a decimal prefix before its unit: 806 TFLOP/s, 3.732 PFLOPs."""
    return _scaled(value, 1000, _PREFIXES, " ") + unit


_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def format_parameters(value: int) -> str:
    """Return a parameter count as model cards write it: 124.4M, 8.030B, 1.026T."""
    return _scaled(value, 1000, ("", "k", "M", "B", "T", "P", "E", "Z", "Y"), "")


def format_bytes(value: int | Fraction) -> str:
    """Return bytes with a binary suffix: 36 MiB, 8.5 GiB."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"), " ")


def _scaled(value: int | Fraction, base: int, suffixes: tuple[str, ...], gap: str) -> str:
    """Return a number with four figures and the first suffix under which it is less than `base`."""
    for exponent, suffix in enumerate(suffixes):
        rounded = float(f"{float(Fraction(value) / base**exponent):.4g}")
        if rounded < base or suffix == suffixes[-1]:
            return f"{rounded:,.10g}{gap}{suffix}"
    raise AssertionError("the last suffix always fits")


def format_items(count: int, item: str) -> str:
    """Write how many there are of an item, whose plural ends in s: "1 step", "1,024 steps"."""
    return f"{count:,} {item}{'' if count == 1 else 's'}"


def format_figure(value: int | float | Fraction) -> str:
    """Return a number with three figures: 4.5, 0.0123, 1,230."""
    return f"{float(f'{float(value):.3g}'):,.10g}"


def format_duration(seconds: float) -> str:
    """Return a time with the unit that suits it: 3.1 us, 42 ms, 5.2 h, 12.4 days, 3.1 years."""
    for limit, size, name in _SPANS:
        if seconds < limit:
            return f"{format_figure(seconds / size)} {name}"
    return f"{format_figure(seconds / _YEAR)} years"


_YEAR = 365.25 * 86400
_SPANS = (
    (1e-6, 1e-9, "ns"),
    (1e-3, 1e-6, "us"),
    (1, 1e-3, "ms"),
    (120, 1, "s"),
    (7200, 60, "min"),
    (172_800, 3600, "h"),
    (2 * _YEAR, 86400, "days"),
)
"""Up to how many seconds a unit is used, its seconds, its name."""


def format_ratio(ratio: Fraction) -> str:
    """Return a weight-state FLOP ratio as 13.1:1 or 1:4.89, three figures on the heavy side."""
    return f"{_three(ratio)}:1" if ratio >= 1 else f"1:{_three(1 / ratio)}"


def _three(value: Fraction) -> str:
    text = f"{float(value):.3g}"
    return f"{round(value):,}" if "e" in text or float(text) >= 100 else text
