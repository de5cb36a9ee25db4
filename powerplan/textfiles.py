"""Reads the text of files and of standard input: whole, of sizes that specs and saved profiles have, or by lines."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from powerplan.errors import InputError

YAML_SUFFIXES = (".yaml", ".yml")

MAX_BYTES = 2**20
"""The largest YAML file that is read."""

MAX_JSON_BYTES = 2**24
"""The largest JSON file that is read: lists of quantized modules make a config.json of 2 to 4 MB."""

USUAL = "a model spec is a few kilobytes"
"""What messages about a file that is too large say of most."""

STDIN = Path("<stdin>")
"""How messages name standard input."""


def read_text(path: Path, limit: int | None = None, usual: str = USUAL) -> str:
    """Return the text of a UTF-8 file of at most `limit` bytes; `usual` says what it should be. Raises InputError.

    Without a limit it is 1 MiB, or 16 MiB where `is_json`.
    """
    with _refusals(path), open(path, "rb", opener=_open_at_once) as file:
        return _text(file, path, limit, usual)


def read_stdin() -> str:
    """Return the text of standard input, to its end; limits and errors are those of `read_text`."""
    with _refusals(STDIN):
        return _text(sys.stdin.buffer, STDIN, None, USUAL) if sys.stdin else ""


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line of a UTF-8 file of any size; STDIN is standard input.

    Raises:
        InputError: the file cannot be read, is no text, or has a line of more than 1 MiB.
    """
    with _refusals(path):
        if path is STDIN:
            yield from _lines(sys.stdin.buffer, path) if sys.stdin else ()
        else:
            with open(path, "rb", opener=_open_at_once) as file:
                yield from _lines(file, path)


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    while raw := file.readline(MAX_BYTES + 1):
        number += 1
        where = f"{path}:{number}"
        if len(raw) > MAX_BYTES:
            raise InputError("is a line of more than 1 MiB", where)
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"is not UTF-8 text (byte 0x{raw[error.start]:02x})", where) from None
        if "\0" in text:
            raise InputError("is not text (a NUL character)", where)
        yield number, text


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that cannot be read, inside a `with` block, into an InputError."""
    name = str(path)
    try:
        yield
    except FileNotFoundError:
        raise InputError("no such file", name) from None
    except IsADirectoryError:
        raise InputError("is a folder, not a file", name) from None
    except PermissionError:
        raise InputError("cannot be read: permission denied", name) from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", name) from None


def _text(file: BinaryIO, path: Path, limit: int | None, usual: str) -> str:
    """Return the text of an open file; see read_text."""
    raw = file.read((limit or MAX_BYTES) + 1)
    if limit is None and len(raw) > MAX_BYTES and is_json(path, raw[:1000].decode(errors="replace")):
        limit, usual = MAX_JSON_BYTES, "a config.json has some megabytes at most"
        raw += file.read(limit + 1 - len(raw))
    if len(raw) > (limit or MAX_BYTES):
        raise InputError(f"is larger than {(limit or MAX_BYTES) >> 20} MiB; {usual}", str(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start})"
        raise InputError(problem, str(path)) from None
    if "\0" in text:
        raise InputError(f"is not text (a NUL character at offset {text.index(chr(0))})", str(path))
    return text


def is_json(path: Path, text: str) -> bool:
    """Whether a file is read as JSON: by its suffix, and without a suffix that says otherwise, as it begins like it."""
    suffix = path.suffix.lower()
    return suffix == ".json" or (suffix not in YAML_SUFFIXES and re.match(r'\ufeff?\s*\{\s*"', text) is not None)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a named pipe that nobody writes to is read as empty."""
    at_once = getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | at_once)
    if at_once:
        os.set_blocking(descriptor, True)
    return descriptor
