"""Typed access to a config.json. Each value is checked when it is read, and each error names its line and column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from powerplan.documents import Document, Step
from powerplan.errors import InputError, shown
from powerplan.part import MAX_SIZE
from powerplan.spec import ModelSpec

MAX_CONFIG_LAYERS = 10_000
"""The most layers that a config.json may have."""


Reader = Callable[["Config", str], ModelSpec]
"""Reads a config, given a name for the model. Raises InputError for what it does not understand."""


@dataclass(frozen=True)
class Family:
    """How a model_type is read.

    read: its reader. like: the model_type whose defaults in transformers are its own, where that is another one.
    defaults: what a file may leave out and transformers has no default for. inert: keys of this family that change no
    count, beside those of all families. aliases: names that its files have for keys, where transformers knows none.
    """

    read: Reader
    like: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)


def keys(text: str) -> frozenset[str]:
    """Return the words of `text`, the names of keys."""
    return frozenset(text.split())


class Keys(Mapping[str, Any]):
    """The keys and values of an object in a file. It remembers which keys were looked up."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self.looked_up: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.looked_up.add(key)
        return self._data[key]

    def __contains__(self, key: object) -> bool:
        self.looked_up.add(str(key))
        return key in self._data

    def peek(self, key: str) -> Any:
        """Return a value without remembering that it was looked up."""
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class Config:
    """A model config, or the part of it at the path `prefix`, such as ("text_config",).

    Methods that take several names of a key (`n_embd`, `hidden_size`) use the first that the file has; the aliases of
    the family's config class are tried as well. null means the same as absence wherever a default exists. Every method
    raises InputError, with the place of the value, where the value has another type or is out of range.

    Attributes:
        data: The keys and values.
        notes: Remarks for the user, in order. Nested configs share the list, the defaults and the aliases.
        defaults: What the file may leave out, by the name of the key.
        aliases: Other names of keys.
        parts: Configs of the objects within this one that were read.
    """

    def __init__(
        self,
        document: Document,
        prefix: tuple[Step, ...] = (),
        changes: Mapping[str, Any] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self.document = document
        self.prefix = prefix
        data: Any = document.data
        for step in prefix:
            data = data[step]
        self.data = Keys(data | changes if changes else data)
        self.notes: list[str] = [] if notes is None else notes
        self.defaults: Mapping[str, Any] = {}
        self.aliases: Mapping[str, str] = {}
        self.parts: list[Config] = []

    def complete(self, defaults: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
        """Set the defaults and the aliases. InputError where the two names of a key have different values."""
        self.defaults, self.aliases = defaults, aliases
        for name, other in aliases.items():
            if {name, other} <= {*self.data}:
                value, others = self.data.peek(name), self.data.peek(other)
                if None not in (value, others) and value != others:
                    raise self.error(f"{name} is {shown(value)}, and {other}, its other name, {shown(others)}", name)

    @property
    def family(self) -> str:
        return str(self.data.get("model_type"))

    def note(self, text: str) -> None:
        """Add a remark for the user, once."""
        if text not in self.notes:
            self.notes.append(text)

    def error(self, problem: str, *path: Step) -> InputError:
        """Return an InputError that names the place of the value at `path`, for the caller to raise."""
        return InputError(problem, self.document.where((*self.prefix, *path)))

    def has(self, key: str) -> bool:
        """Whether the file states `key`, and not as null."""
        return self.data.get(key) is not None

    def names(self, *names: str) -> list[str]:
        """Return `names` and their aliases."""
        return [other for name in names for other in dict.fromkeys((name, self.aliases.get(name, name)))]

    def key(self, *names: str) -> str:
        """Return the first of `names`, or of their aliases, that the file has, else the first of all."""
        return next((name for name in self.names(*names) if name in self.data), names[0])

    def default(self, *names: str) -> Any:
        """Return what a file that leaves out all of `names` means by that, None where that is unknown."""
        return next((self.defaults[name] for name in self.names(*names) if name in self.defaults), None)

    def value(self, *names: str) -> Any:
        """Return the value that takes effect: the file's, unless it is null, else the default."""
        stated = self.data.get(self.key(*names))
        return self.default(*names) if stated is None else stated

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """Return an integer from `low` to `high`. InputError if the file has none and there is no default."""
        value = self.optional_integer(*names, low=low, high=high)
        if value is None:  # Also for null, where there is a default.
            value = self.default(*names)
            value = value if type(value) is int else default
        if value is None:
            has_none = "it is null" if names[0] in self.data else "the file has none"
            raise self.error(f"{self.family} needs {names[0]}, and {has_none}", names[0])
        return value

    def optional_integer(self, *names: str, low: int = 1, high: int = MAX_SIZE) -> int | None:
        """Return an integer from `low` to `high`, None where the file says null or has neither key nor default."""
        name = self.key(*names)
        if name not in self.data:
            default = self.default(*names)
            return default if type(default) is int else None
        value = self.data[name]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{name} must be an integer, and is {shown(value)}", name)
        if not low <= value <= high:
            raise self.error(f"{name} {shown(value)} is out of range; allowed are {low:,} to {high:,}", name)
        return value

    def multiple(self, name: str, default: float, of: int) -> int:
        """Return `of` times a factor of the file, such as an expansion of the width. The product must be whole."""
        factor = self.value(name)
        factor = default if factor is None else factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= MAX_SIZE:
            raise self.error(f"{name} must be a number above 0, and is {shown(factor)}", name)
        product = factor * of
        if abs(product - round(product)) > 1e-9 * product or round(product) < 1:
            raise self.error(f"{name} {shown(factor)} does not make {of:,} a whole number", name)
        return round(product)

    def _typed(self, name: str, kind: type[Any], expected: str, entries: type | None = None) -> Any:
        """Return the value of `name`, a `kind` (of `entries`, where true is no int), None where there is none."""
        stated = self.key(name)
        value = self.data.get(stated)
        of_kind = isinstance(value, kind) and (entries is None or all(type(entry) is entries for entry in value))
        if value is not None and not of_kind:
            raise self.error(f"{stated} must be {expected}, and is {shown(value)}", stated)
        return self.default(name) if value is None else value

    def nested(self, name: str) -> Config | None:
        """Return the object under `name` as a config of its own, or None where the file has none."""
        stated = self.data.get(name)
        if stated is not None and not isinstance(stated, dict):
            raise self.error(f"{name} must be an object, and is {shown(stated)}", name)
        return None if stated is None else self.part(name)

    def part(self, *path: Step) -> Config:
        """Return the object at `path` as a config of its own."""
        inner = Config(self.document, (*self.prefix, *path))
        inner.notes = self.notes
        inner.complete(self.defaults, self.aliases)
        self.parts.append(inner)
        return inner

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false: the file's, else the family's default, else `default`."""
        value = self._typed(name, bool, "true or false")
        return value if isinstance(value, bool) else default

    def integers(self, name: str) -> list[int]:
        """Return a list of integers, empty where there is none."""
        return list(self._typed(name, list, "a list of integers", int) or [])

    def strings(self, name: str) -> list[str] | None:
        """Return a list of strings, or None where there is none."""
        value: list[str] | None = self._typed(name, list, "a list of words", str)
        return value

    def word(self, name: str, allowed: Sequence[str]) -> str:
        """Return one of the words `allowed`; the first of them where there is none."""
        value = self.value(name)
        value = allowed[0] if value is None else value
        if value not in allowed:
            problem = f"{name} {shown(value)} is not supported; supported is {' or '.join(allowed)}"
            raise self.error(problem, self.key(name))
        return str(value)

    def refuse(self, name: str, because: str) -> None:
        """Raise InputError if the file sets `name` to anything but null, false, 0 or an empty list."""
        value = self.value(name)
        if value:
            raise self.error(f"{name} {shown(value)} is not supported: {because}", name)

    def derived(self, name: str, value: int | list[int], source: str) -> None:
        """Raise InputError if the file states `name` as another value than the one that follows from `source`."""
        if self.has(name) and self.data[name] != value:
            follows = f"{value:,}" if isinstance(value, int) else str(value)
            raise self.error(f"{name} is {shown(self.data[name])}, and {source} makes it {follows}", name)

    def check_divides(self, name: str, value: int, total_name: str, total: int) -> None:
        """Raise InputError, at `name`, unless its value divides that of `total_name`."""
        if total % value:
            raise self.error(f"{name} {value} does not divide {total_name} {total}", name)

    @property
    def layer_count(self) -> int:
        return self.integer("num_hidden_layers", "n_layer", high=MAX_CONFIG_LAYERS)
