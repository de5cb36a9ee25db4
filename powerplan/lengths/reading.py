"""Reads lengths of documents: a file with one a line, the name of a distribution, shares of documents, or numbers."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from itertools import islice
from math import lcm
from pathlib import Path
from typing import Any

from powerplan.errors import InputError, did_you_mean, parameter, shown
from powerplan.lengths.histogram import MAX_DIFFERENT, MAX_DOCUMENTS, Lengths
from powerplan.lengths.lognormal import DOCUMENTS, LONGEST, MAX_SIGMA, MIN_SIGMA, lognormal_counts, solved
from powerplan.lists import parse_settings, split_words
from powerplan.textfiles import lines_of
from powerplan.units import MAX_CONTEXT, context_text, integer_of, parse_context

LengthsInput = str | Path | Lengths | Mapping[int, int] | Iterable[int]
"""A file or a text as `--lengths` takes it, numbers of documents by their lengths, or the length of every document."""

LOGNORMAL = "lognormal"

SETTINGS = ("mean", "median", "p99", "sigma", "max")
"""What `lognormal:` takes: two of the first four, and the longest document."""

WRITE = "4k:0.9,64k:0.1 (shares of documents) or lognormal:mean=4k,p99=64k"
"""What a text may be beside a path, as messages say it."""

_SHARES = re.compile(r"[0-9][0-9_.]*[kKmMgG]?(:[^:,/\\]*)?(,[0-9][0-9_.]*[kKmMgG]?(:[^:,/\\]*)?)*")
_WEIGHT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def read_lengths(lengths: LengthsInput) -> Lengths:
    """Return the documents that a parameter `lengths` describes.

    Args:
        lengths: a path, as text where no distribution is meant by it; "lognormal:mean=4k,p99=64k"; shares of documents,
            as "4k:0.9,64k:0.1"; numbers of documents by their lengths; or the tokens of every document, as a list, an
            array or a tensor.

    Raises:
        InputError: it is none of these, or the documents are too many or out of range. The message begins with the
            parameter, or with file and line.
    """
    where = parameter("lengths")
    if isinstance(lengths, Lengths):
        return lengths
    if isinstance(lengths, Path):
        return read_file(lengths)
    if isinstance(lengths, str):
        return _of_text(lengths.strip(), where)
    if isinstance(lengths, Mapping):
        whole = {_whole(length, where): _whole(count, where) for length, count in lengths.items()}
        return Lengths.of(whole, where=where)
    return Lengths.of(counted(lengths, where), where=where)


def counted(lengths: Any, where: str) -> Counter[int]:
    """Return how many documents there are of each length, of a list, an array or a tensor; raises InputError."""
    advice = "give the tokens of each document, as [4096, 512]"
    values = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"{shown(values)} is not a list of lengths; {advice}", where)
    values = list(values)
    if set(map(type, values)) != {int}:  # A million ints are checked in 20 ms, and each on its own would take 100.
        values = [_whole(value, where) for value in values]
    documents = Counter(values)
    if not documents:
        raise InputError(f"is empty; {advice}", where)
    if (shortest := min(documents)) < 1:
        raise InputError(f"a document has 1 token or more, and one has {shown(shortest)}", where)
    return documents


def _whole(value: Any, where: str) -> int:
    """Return an integer of any kind, such as numpy's, as an int."""
    number = integer_of(value)
    if number is None:
        raise InputError(f"{shown(value)} is not a whole number of tokens", where)
    return number


def _of_text(text: str, where: str) -> Lengths:
    if not text:
        raise InputError(f"is empty; write a path, {WRITE}", where)
    name, colon, settings = text.partition(":")
    if colon and name == LOGNORMAL:
        return _lognormal(settings, text, where)
    if _SHARES.fullmatch(text):
        return _shares(text, where)
    path = Path(text)
    if not os.path.lexists(path):
        near = did_you_mean(name, [LOGNORMAL]) if colon else ""
        raise InputError(f"{shown(text)} is neither a file nor lengths{near or f'; write a path, {WRITE}'}", where)
    return read_file(path)


def _lognormal(settings: str, label: str, where: str) -> Lengths:
    write, of = f"{LOGNORMAL}:mean=4k,p99=64k", f"a setting of {LOGNORMAL}"
    texts = parse_settings(settings, SETTINGS, where, write, of=of) if settings else {}
    known = {
        name: _sigma(value, where) if name == "sigma" else parse_context(value, f"{where} {name}", "a document")
        for name, value in texts.items()
    }
    longest = int(known.pop("max", LONGEST))
    if len(known) != 2:
        given = f"has {' and '.join(known)}" if known else "has none"
        raise InputError(f"{LOGNORMAL} takes two of mean, median, p99 and sigma, and {given}", where)
    return Lengths.of(lognormal_counts(*solved(known, longest, where), longest), label, where)


def _sigma(text: str, where: str) -> float:
    value = float(text) if _WEIGHT.fullmatch(text) else None
    if value is None or not MIN_SIGMA <= value <= MAX_SIGMA:
        raise InputError(f"{shown(text)} is not a sigma; allowed are {MIN_SIGMA} to {MAX_SIGMA:g}", f"{where} sigma")
    return value


def _shares(text: str, where: str) -> Lengths:
    """Return documents of some lengths in the proportions that a text such as "4k:0.9,64k:0.1" gives.

    There are about DOCUMENTS of them, in exactly these proportions: a few would fill their last sequence in part.
    """
    weights: dict[int, Fraction] = {}
    for pair in text.split(","):
        size, colon, share = pair.partition(":")
        length = parse_context(size, where, "a document")
        if colon and (not _WEIGHT.fullmatch(share) or not Fraction(share)):
            problem = f"{shown(share)} is not a share of documents; write {context_text(length)}:0.9, or {length}:3"
            raise InputError(problem, where)
        if length in weights:
            raise InputError(f"{size} is given twice", where)
        weights[length] = Fraction(share) if colon else Fraction(1)
    common = lcm(*(weight.denominator for weight in weights.values()))
    common *= max(1, int(DOCUMENTS / (common * sum(weights.values()))))
    return Lengths.of({length: int(weight * common) for length, weight in weights.items()}, text, where)


def read_file(path: Path) -> Lengths:
    """Read the lengths of documents from a file; STDIN is standard input. Only their histogram is kept.

    The first line that is not empty says what all are: {"length": 4096, "count": 3} in each line of a JSONL; a header
    with the column length, and count if there is one; or a length, and perhaps a comma and how many documents have it.

    Raises:
        InputError: the file cannot be read, holds no lengths, or a line holds none. The message begins with the file,
            and the line where there is one.
    """
    counts: dict[int, int] = {}
    parse: Callable[[str, str], tuple[int, int]] | None = None
    for number, line in lines_of(path):
        text = line.strip()
        if not text:
            continue
        where = f"{path}:{number}"
        if parse is None:
            if text.startswith("{"):
                parse = _json_line
            elif re.match(r'["\s]*[A-Za-z_]', text):
                parse = _Columns.of(text, where)
                continue
            else:
                parse = _Columns(0, 1, 2)
        length, count = parse(text, where)
        counts[length] = counts.get(length, 0) + count
        if len(counts) > MAX_DIFFERENT:  # Before the rest of a long file is read.
            break
    return Lengths.of(counts, path.name, str(path))


class _Columns:
    """Reads the lines of a CSV; length, count: their columns. most: columns, where there is no header."""

    def __init__(self, length: int, count: int | None, most: int | None) -> None:
        self.length, self.count, self.most = length, count, most

    @classmethod
    def of(cls, header: str, where: str) -> _Columns:
        names = [name.strip('"').lower() for name in split_words(header)]
        if "length" not in names:
            wanted = _renamed(names) or "; write a length in each line, or name the column length"
            raise InputError(f"{shown(header)} has no column length{wanted}", where)
        return cls(names.index("length"), names.index("count") if "count" in names else None, None)

    def __call__(self, text: str, where: str) -> tuple[int, int]:
        cells = text.split(",") if '"' not in text else _quoted(text, where)
        if self.most is not None and len(cells) > self.most:
            raise InputError(f"{shown(text)} is not a length; write 4096, or 4096,12 for 12 documents", where)
        last = max(self.length, self.count or 0) if self.most is None else self.length
        if len(cells) <= last:
            found = "1 column" if len(cells) == 1 else f"{len(cells)} columns"
            raise InputError(f"{shown(text)} has {found}, and the header has more", where)
        counts = self.count is not None and len(cells) > self.count
        return _length(cells[self.length], where), _count(cells[self.count or 0], where) if counts else 1


def _quoted(text: str, where: str) -> list[str]:
    import csv  # Few files need it.

    try:
        return next(csv.reader([text]))
    except csv.Error as error:
        raise InputError(f"{shown(text)} is not valid CSV: {error}", where) from None


def _json_line(text: str, where: str) -> tuple[int, int]:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{shown(text)} is not valid JSON", where) from None
    if not isinstance(entry, dict) or "length" not in entry:
        keys = entry if isinstance(entry, dict) else ()
        raise InputError(f'{shown(text)} has no key "length"{_renamed(keys)}', where)
    length, count = entry["length"], entry.get("count", 1)
    for name, value in (("length", length), ("count", count)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name}: {shown(value)} is not a whole number", where)
    return _length(str(length), where), _count(str(count), where)


def _renamed(names: Iterable[str]) -> str:
    """Return "; write length in place of lenght" where one of the first names of a file is close to it, else ""."""
    near = next((name for name in islice(names, 100) if did_you_mean(name, ["length"])), None)
    return f"; write length in place of {near}" if near else ""


def _length(text: str, where: str) -> int:
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) <= 16 and 1 <= (length := int(text)) <= MAX_CONTEXT:
        return length
    if re.fullmatch(r"-?[0-9]{1,16}", text) and not 1 <= int(text) <= MAX_CONTEXT:
        raise InputError(f"a document has 1 to {MAX_CONTEXT:,} tokens (2^50), and this one {shown(int(text))}", where)
    return parse_context(text, where, "a document")


def _count(text: str, where: str) -> int:
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) <= 16 and 1 <= (count := int(text)) <= MAX_DOCUMENTS:
        return count
    raise InputError(f"{shown(text)} is not a number of documents; allowed are 1 to {MAX_DOCUMENTS:,}", where)
