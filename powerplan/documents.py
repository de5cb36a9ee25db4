"""YAML and JSON files as plain data that remembers where every value stood, so that an error can say it.

Nothing in a file runs: YAML tags are refused, aliases are counted, sizes and depths are bounded.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from powerplan.errors import InputError, shown

MAX_BYTES = 2**20
MAX_DEPTH = 60
MAX_VALUES = 100_000

Step = str | int
Place = tuple[int, int]


@dataclass
class Node:
    """A value of a document and its place (line and column from 1)."""

    value: Any
    place: Place
    size: int = 1
    depth: int = 1
    children: dict[Step, Node] = field(default_factory=dict)
    keys: dict[Step, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """The data of a file, and the way from a path in the data back to file:line:column."""

    name: str
    data: Any
    root: Node

    def where(self, path: Sequence[Step] = (), at_key: bool = False) -> str:
        """Return "file:line:column" of the value at `path`, or of the nearest value above it that exists.

        With `at_key` the place of the key itself, where the last step is a key of a mapping.
        """
        node, place = self.root, self.root.place
        for index, step in enumerate(path):
            if at_key and index == len(path) - 1 and step in node.keys:
                place = node.keys[step]
                break
            if step not in node.children:
                continue
            node = node.children[step]
            place = node.place
        return f"{self.name}:{place[0]}:{place[1]}"


def read_text(path: Path, name: str | None = None) -> str:
    """Return the text of a UTF-8 file of at most 1 MiB; raises InputError that names the file otherwise."""
    name = name or str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError("no such file", name) from None
    except IsADirectoryError:
        raise InputError("is a folder, not a file", name) from None
    except PermissionError:
        raise InputError("cannot be read: permission denied", name) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", name) from None
    if len(raw) > MAX_BYTES:
        raise InputError("is larger than 1 MiB; a model spec is a few kilobytes", name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start})", name) from None
    if "\0" in text:
        raise InputError(f"is not text (a NUL character at offset {text.index(chr(0))})", name)
    return text


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document of mappings, lists and plain scalars (YAML 1.2 core: no dates, no octal, no yes/no)."""
    builder = _YamlBuilder(name)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InputError(f"is not valid YAML: {error.problem or error.context}", where) from None
    except yaml.YAMLError as error:
        raise InputError(f"is not valid YAML: {str(error).splitlines()[0]}", name) from None
    if builder.root is None:
        raise InputError("is empty", name)
    return Document(name, builder.root.value, builder.root)


# The C parser reads the catalogue's 30 lines in a fifth of the time of the pure one; some builds of PyYAML lack it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", ".Inf", ".INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}


def _plain_scalar(text: str) -> Any:
    if text in _SPECIAL:
        return _SPECIAL[text]
    try:
        if _INT.fullmatch(text):
            return int(text.replace("_", ""))
        if _FLOAT.fullmatch(text):
            return float(text.replace("_", ""))
    except ValueError:
        raise OverflowError from None
    return text


class _YamlBuilder:
    """Builds nodes from parser events with a stack of its own, so that depth cannot exhaust Python's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root: Node | None = None
        self.documents = 0
        self.values = 0
        self.open: list[tuple[Node, str | None]] = []
        self.pending_key: list[tuple[str, Place] | None] = []
        self.anchors: dict[str, Node | None] = {}

    def fail(self, problem: str, place: Place) -> InputError:
        return InputError(problem, f"{self.name}:{place[0]}:{place[1]}")

    def take(self, event: Any) -> None:
        place = (event.start_mark.line + 1, event.start_mark.column + 1)
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise self.fail("a second YAML document starts here; a spec is one document", place)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.fail(f"alias *{event.anchor} has no anchor before it", place)
            target = self.anchors[event.anchor]
            if target is None:
                raise self.fail(f"alias *{event.anchor} stands inside its own anchor", place)
            self.add(target, place)
        elif isinstance(event, yaml.NodeEvent):
            self.start(event, place)
        elif isinstance(event, yaml.CollectionEndEvent):
            node, anchor = self.open.pop()
            self.pending_key.pop()
            if anchor is not None:
                self.anchors[anchor] = node
            self.add(node, node.place)

    def start(self, event: Any, place: Place) -> None:
        if event.tag is not None and event.tag != "!":
            raise self.fail(f"tag {shown(event.tag)} is not accepted; a spec is plain data", place)
        if isinstance(event, yaml.ScalarEvent):
            try:
                value = _plain_scalar(event.value) if event.implicit[0] else event.value
            except OverflowError:
                raise self.fail("a number of thousands of digits is out of range", place) from None
            node = Node(value, place)
            if event.anchor is not None:
                self.anchors[event.anchor] = node
            self.add(node, place)
            return
        if len(self.open) >= MAX_DEPTH:
            raise self.fail(f"is nested more than {MAX_DEPTH} levels deep", place)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        node = Node({} if isinstance(event, yaml.MappingStartEvent) else [], place)
        self.open.append((node, event.anchor))
        self.pending_key.append(None)

    def add(self, node: Node, place: Place) -> None:
        """Put a finished node where it belongs: the root, a list, or a mapping's next key or value."""
        if not self.open:
            self.root = node
            return
        parent, _ = self.open[-1]
        key = self.pending_key[-1]
        if isinstance(parent.value, dict) and key is None:
            if not isinstance(node.value, (str, int, float, bool, type(None))):
                raise self.fail("a key must be a word, not a list or a mapping", place)
            self.pending_key[-1] = (node.value if isinstance(node.value, str) else str(node.value), place)
            return
        parent.size += node.size
        parent.depth = max(parent.depth, node.depth + 1)
        if parent.size > MAX_VALUES:
            raise self.fail(f"expands to more than {MAX_VALUES:,} values", place)
        if parent.depth > MAX_DEPTH:
            raise self.fail(f"is nested more than {MAX_DEPTH} levels deep", place)
        if isinstance(parent.value, list):
            parent.children[len(parent.value)] = node
            parent.value.append(node.value)
            return
        assert key is not None
        self.pending_key[-1] = None
        name, key_place = key
        if name == "<<":
            self.merge(parent, node, key_place)
            return
        if name in parent.keys:
            raise self.fail(f"key {shown(name)} stands twice; first at line {parent.keys[name][0]}", key_place)
        parent.value[name] = node.value
        parent.children[name] = node
        parent.keys[name] = key_place

    def merge(self, parent: Node, node: Node, place: Place) -> None:
        """Merge key `<<`: take over the keys of another mapping that this one does not set itself."""
        sources = list(node.children.values()) if isinstance(node.value, list) else [node]
        for source in sources:
            if not isinstance(source.value, dict):
                raise self.fail("<< takes a mapping, or a list of mappings", place)
            for name, child in source.children.items():
                if name not in parent.children:
                    parent.value[name] = child.value
                    parent.children[name] = child


def parse_json(text: str, name: str) -> Document:
    """Parse a JSON object; duplicate keys are refused, as they are in YAML."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise InputError(f"key {shown(key)} stands twice in one object", name)
            result[key] = value
        return result

    try:
        data = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise InputError(f"is not valid JSON: {error.msg}", f"{name}:{error.lineno}:{error.colno}") from None
    except RecursionError:
        raise InputError("is nested too deeply to be a model config", name) from None
    except ValueError:  # an integer of more than 4,300 digits
        raise InputError("has a number of thousands of digits", name) from None
    return Document(name, data, _JsonPlaces(text).node(data))


class _JsonPlaces:
    """Finds the places of an object's keys, and of the keys of objects directly inside it, in text that has parsed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.decoder = json.JSONDecoder()
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def node(self, data: Any) -> Node:
        start = self._skip(0)
        root = Node(data, self._place(start))
        if isinstance(data, dict):
            self._fill(root, start, levels=2)
        return root

    def _skip(self, index: int) -> int:
        while index < len(self.text) and self.text[index] in " \t\n\r":
            index += 1
        return index

    def _place(self, index: int) -> Place:
        line = bisect_right(self.line_starts, index)
        return line, index - self.line_starts[line - 1] + 1

    def _fill(self, node: Node, start: int, levels: int) -> None:
        index = self._skip(start + 1)
        while self.text[index] != "}":
            key_place = self._place(index)
            key, index = self.decoder.raw_decode(self.text, index)
            index = self._skip(self._skip(index) + 1)
            value, end = self.decoder.raw_decode(self.text, index)
            child = Node(value, self._place(index))
            if isinstance(value, dict) and levels > 1:
                self._fill(child, index, levels - 1)
            node.children[key] = child
            node.keys[key] = key_place
            index = self._skip(end)
            if self.text[index] == ",":
                index = self._skip(index + 1)
