"""Reads YAML and JSON as plain data, with the line and column of every value for error messages.

Nothing in a text is executed: YAML tags are refused. The depth and the number of values are limited, and an
alias counts as often as it is used. Places in JSON are found when an error needs one: json.loads reads a config.json of
some megabytes in a tenth of the time.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from powerplan.errors import InputError, shown

MAX_DEPTH = 60
"""The most mappings and lists within each other."""

MAX_VALUES = 100_000
"""The most values in a YAML document, aliases expanded."""

MAX_JSON_VALUES = 1_000_000
"""The most values in a JSON document."""

Step = str | int
"""One step of a path in the data: a key or an index."""

Place = tuple[int, int]
"""Line and column, from 1."""


@dataclass(slots=True)
class Node:
    """A value of a document and its place.

    size: how many values it holds, itself included. depth: how many levels it has.
    children: nodes of its values, by key or index. keys: the places of its keys.
    anchor: its name for aliases. pending_key: a key of a mapping whose value has not been added yet.
    """

    value: Any
    place: Place
    size: int = 1
    depth: int = 1
    children: dict[Step, Node] = field(default_factory=dict)
    keys: dict[Step, Place] = field(default_factory=dict)
    anchor: str | None = None
    pending_key: tuple[str, Place] | None = None


@dataclass(frozen=True)
class Document:
    """The data of a file, and the places of all values. name: the file, as errors name it.

    locate: finds the places; None for data that no file holds, where errors have the name alone.
    """

    name: str
    data: Any
    locate: Callable[[], Node] | None

    @cached_property
    def root(self) -> Node:
        assert self.locate is not None, "a file holds the data"
        return self.locate()

    def where(self, path: Sequence[Step] = (), at_key: bool = False) -> str:
        """Return "file:line:column" of the value at `path`, or of the nearest value above it that exists.

        at_key: return the place of the last step's key instead of its value.
        """
        if self.locate is None:
            return self.name
        node, place = self.root, self.root.place
        for index, step in enumerate(path):
            if at_key and index == len(path) - 1 and step in node.keys:
                place = node.keys[step]
                break
            if step not in node.children:
                break
            node = node.children[step]
            place = node.place
        return f"{self.name}:{place[0]}:{place[1]}"


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document of mappings, lists and scalars (YAML 1.2 core: no dates, no octal numbers, no yes/no)."""
    builder = _YamlBuilder(name)
    if match := _NOT_YAML.search(text):
        what = f"a control character, {shown(match[0])}," if len(match[0]) == 1 else "a %TAG directive"
        raise builder.fail(f"{what} is not accepted; a spec is plain data", _place(text, match.start()))
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, name) from None
    except yaml.YAMLError as error:
        raise InputError(f"is not valid YAML: {str(error).splitlines()[0]}", name) from None
    return builder.document()


# The C parser takes a fifth of the time of the Python parser for a model of 30 lines; some builds of PyYAML lack it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Characters that YAML forbids, since the parser reports them without their line; and %TAG directives, since a megabyte
# of them takes the parser seconds.
_NOT_YAML = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]|(?:(?<=[\n\r\x85\u2028\u2029])|\\A)%TAG"
)
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


def _place(text: str, index: int) -> Place:
    """Return line and column of a character; lines end where YAML ends them."""
    line, start = 1, 0
    for match in _LINE_BREAK.finditer(text, 0, index):
        line, start = line + 1, match.end()
    return line, index - start + 1


def _syntax_error(error: yaml.MarkedYAMLError, text: str, name: str) -> InputError:
    """Return the error for what the parser reports, in plain words and with its place."""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return InputError(f"is not valid YAML: {error.problem or error.context}", name)
    problem = error.problem or error.context or "it cannot be read"
    place = f"{name}:{mark.line + 1}:{mark.column + 1}"
    # The parser's own limit, which it may meet before the first bracket is taken.
    if "maximum nesting depth" in problem:
        return InputError(f"is nested more than {MAX_DEPTH} levels deep", place)
    character = text[mark.index : mark.index + 1]
    if problem.startswith("found character") and problem.endswith("that cannot start any token"):
        tab = "a tab stands here; YAML is indented with spaces"
        problem = tab if character == "\t" else f"a value cannot begin with {character}; put it in quotes"
    elif problem.startswith("mapping values are not allowed"):
        problem = "a key cannot stand here; check the indentation, and put a text that contains ': ' in quotes"
    elif problem.endswith("<document start>"):
        problem = "the document has ended, and more stands here; check the indentation"
    elif error.context and error.context_mark:
        context, advice = error.context, "; check the indentation" if "block" in error.context else ""
        for term, plain in _PLAIN_WORDS.items():
            context = context.replace(term, plain)
        problem = f"{problem}, {context} that begins at line {error.context_mark.line + 1}{advice}"
    return InputError(f"is not valid YAML: {problem}", place)


_PLAIN_WORDS = {
    "flow sequence": "list in brackets",
    "flow mapping": "mapping in braces",
    "flow node": "value",
    "block collection": "list",
    "block sequence": "list",
    "block mapping": "mapping",
    "block node": "value",
    "block scalar": "text",
    "plain scalar": "text",
    "quoted scalar": "quoted text",
    "simple key": "key",
}
"""Terms of the parser, and the words for them in error messages."""

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


def plain_scalar(text: str) -> Any:
    """Return the value of a scalar without quotes. Raises ValueError for an integer of thousands of digits."""
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return text


class _Builder:
    """Builds the nodes of a document. It has its own stack: a deep document cannot exhaust Python's."""

    def __init__(self, name: str, most_values: int = MAX_VALUES) -> None:
        self.name, self.most_values = name, most_values
        self.root: Node | None = None
        self.open: list[Node] = []

    def fail(self, problem: str, place: Place) -> InputError:
        return InputError(problem, f"{self.name}:{place[0]}:{place[1]}")

    def document(self) -> Document:
        root = self.root
        if root is None:
            raise InputError("is empty", self.name)
        return Document(self.name, root.value, lambda: root)

    def begin(self, empty: dict[str, Any] | list[Any], place: Place, anchor: str | None = None) -> None:
        """Open a mapping or a list, to which everything belongs that is added until `end`."""
        if len(self.open) >= MAX_DEPTH:
            raise self.fail(f"is nested more than {MAX_DEPTH} levels deep", place)
        self.open.append(Node(empty, place, anchor=anchor))

    def end(self) -> Node:
        """Close the innermost mapping or list and add it to the one around it."""
        node = self.open.pop()
        self.add(node, node.place)
        return node

    def scalar(self, read: Callable[[str], Any], text: str, place: Place) -> Node:
        """Add the scalar `read(text)`."""
        try:
            node = Node(read(text), place, children=_NO_NODES, keys=_NO_PLACES)
        except ValueError:
            raise self.fail("a number of thousands of digits is out of range", place) from None
        if isinstance(node.value, str) and _SURROGATE.search(node.value):
            raise self.fail("half of a surrogate pair is not a character", place)
        self.add(node, place)
        return node

    def add(self, node: Node, place: Place) -> None:
        """Add a finished node as the root, to a list, or as the next key or value of a mapping."""
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        key, parent.pending_key = parent.pending_key, None
        if isinstance(parent.value, dict) and key is None:
            if not isinstance(node.value, str):
                raise self.fail(f"a key must be a word, and this is {shown(node.value)}", place)
            parent.pending_key = (node.value, place)
            return
        parent.size += node.size
        parent.depth = max(parent.depth, node.depth + 1)
        if parent.size > self.most_values:
            raise self.fail(f"holds more than {self.most_values:,} values", place)
        if parent.depth > MAX_DEPTH:
            raise self.fail(f"is nested more than {MAX_DEPTH} levels deep", place)
        if isinstance(parent.value, list):
            parent.children[len(parent.value)] = node
            parent.value.append(node.value)
            return
        assert key is not None
        self.put(parent, *key, node)

    def put(self, parent: Node, key: str, place: Place, node: Node) -> None:
        """Put a value under a key of a mapping."""
        if key in parent.keys:
            raise self.fail(f"key {shown(key)} is given twice; first at line {parent.keys[key][0]}", place)
        parent.value[key] = node.value
        parent.children[key] = node
        parent.keys[key] = place


_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_NODES: dict[Step, Node] = {}
_NO_PLACES: dict[Step, Place] = {}


class _YamlBuilder(_Builder):
    """Builds nodes from the events of the YAML parser."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.anchors: dict[str, Node | None] = {}

    def take(self, event: Any) -> None:
        place = (event.start_mark.line + 1, event.start_mark.column + 1)
        if isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
            raise self.fail("a second YAML document starts here; a spec is one document", place)
        if isinstance(event, yaml.AliasEvent):
            self.add(self.anchored(str(event.anchor), place), place)
        elif isinstance(event, yaml.NodeEvent):
            self.start(event, place)
        elif isinstance(event, yaml.CollectionEndEvent):
            node = self.end()
            if node.anchor is not None:
                self.anchors[node.anchor] = node

    def anchored(self, anchor: str, place: Place) -> Node:
        """Return the node that an alias stands for."""
        alias = f"alias *{anchor[:60]}"
        if anchor not in self.anchors:
            raise self.fail(f"{alias} has no anchor before it", place)
        target = self.anchors[anchor]
        if target is None:
            raise self.fail(f"{alias} stands inside its own anchor", place)
        return target

    def start(self, event: Any, place: Place) -> None:
        if event.tag is not None and event.tag != "!":
            raise self.fail(f"tag {shown(event.tag)} is not accepted; a spec is plain data", place)
        anchored = None
        if isinstance(event, yaml.ScalarEvent):
            anchored = self.scalar(plain_scalar if event.implicit[0] else str, event.value, place)
        else:
            self.begin({} if isinstance(event, yaml.MappingStartEvent) else [], place, event.anchor)
        if event.anchor is not None:
            self.anchors[event.anchor] = anchored

    def put(self, parent: Node, key: str, place: Place, node: Node) -> None:
        """Put a value under a key of a mapping; `<<` merges the keys that the mapping does not have itself."""
        if key != "<<":
            super().put(parent, key, place, node)
            return
        sources = list(node.children.values()) if isinstance(node.value, list) else [node]
        for source in sources:
            if not isinstance(source.value, dict):
                raise self.fail(f"<< takes a mapping, or a list of mappings, and this is {shown(source.value)}", place)
            for name, child in source.children.items():
                if name not in parent.children:
                    parent.value[name] = child.value
                    parent.children[name] = child


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s\[\]{},:"]+', re.DOTALL)
"""A string, a bracket, a number or a word, in text that is known to be JSON."""


def parse_json(text: str, name: str) -> Document:
    """Parse a JSON document. Raises InputError, with `name` and the place; duplicate keys are refused, as in YAML."""
    if not text.strip():
        raise InputError("is empty", name)
    try:
        data = json.loads(text, object_pairs_hook=_unique)
        sound = _is_sound(data)
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")
        raise InputError(f"is not valid JSON: {problem}", f"{name}:{error.lineno}:{error.colno}") from None
    except (RecursionError, ValueError):
        data, sound = None, False
    if sound:
        return Document(name, data, lambda: _located_json(text, name).root)
    return _located_json(text, name)  # Says what is wrong, and where.


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError where a key is given twice."""
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError
    return data


def _is_sound(data: Any) -> bool:
    """Whether a parsed document keeps the limits of depth and size, and holds no half of a surrogate pair."""
    level, count = [data], 0
    for _ in range(MAX_DEPTH):
        count += len(level)
        texts = [value for value in level if isinstance(value, str)]
        texts += [key for value in level if isinstance(value, dict) for key in value]
        if count > MAX_JSON_VALUES or _SURROGATE.search("\n".join(texts)):
            return False
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return True
    return False


def _located_json(text: str, name: str) -> Document:
    """Return a document with the places of all values, of text that begins with valid JSON."""
    builder = _Builder(name, MAX_JSON_VALUES)
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    for match in _JSON_TOKEN.finditer(text):
        token, start = match[0], match.start()
        line = bisect_right(line_starts, start)
        place = (line, start - line_starts[line - 1] + 1)
        if token in "{[":
            builder.begin({} if token == "{" else [], place)
        elif token in "}]":
            builder.end()
        else:
            builder.scalar(json.loads, token, place)
    return builder.document()
