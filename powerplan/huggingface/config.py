"""Typed access to a config.json. Each value is checked when it is read, and each error names its line and column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from powerplan.documents import Document, Step
from powerplan.errors import InputError, shown
from powerplan.mixers.base import MAX_SIZE
from powerplan.spec import ModelSpec

MAX_CONFIG_LAYERS = 10_000
"""The most layers that a config.json may have."""


class Family:
    """How a model_type is read: by `read`, with `defaults` for integers that a file may leave out, by key.

    `read` takes a config and a name for the model, and raises InputError for what it does not understand.
    """

    def __init__(self, read: Callable[[Config, str], ModelSpec], **defaults: int) -> None:
        self.read = read
        self.defaults = defaults


class Config:
    """A model config, or the part of it under the keys of `prefix`, such as ("text_config",).

    Methods that take several names of a key (`n_embd`, `hidden_size`) use the first that the file has. null means the
    same as absence wherever a default exists. Every method raises InputError, with the place of the value, where the
    value has another type or is out of range.

    Attributes:
        data: The keys and values.
        notes: Remarks for the user, in order. Nested configs share the list and the defaults.
        defaults: The family's values of integers that the file may leave out, by the first name of the key.
    """

    def __init__(self, document: Document, prefix: tuple[str, ...] = ()) -> None:
        self.document = document
        self.prefix = prefix
        data: Any = document.data
        for step in prefix:
            data = data[step]
        self.data: Mapping[str, Any] = data
        self.notes: list[str] = []
        self.defaults: Mapping[str, int] = {}

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

    def key(self, *names: str) -> str:
        """Return the first of `names` that the file has, else the first of all."""
        return next((name for name in names if name in self.data), names[0])

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """Return an integer from `low` to `high`. InputError if the file has none and there is no default."""
        default = self.defaults.get(names[0]) if default is None else default
        value = self.optional_integer(*names, low=low, high=high)
        value = default if value is None else value
        if value is None:
            has_none = "it is null" if names[0] in self.data else "the file has none"
            raise self.error(f"{self.family} needs {names[0]}, and {has_none}", names[0])
        return value

    def optional_integer(self, *names: str, low: int = 1, high: int = MAX_SIZE) -> int | None:
        """Return an integer from `low` to `high`, None where the file says null or has neither key nor default."""
        name = self.key(*names)
        value = self.data.get(name)
        if value is None:
            return None if name in self.data else self.defaults.get(names[0])
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{name} must be an integer, and is {shown(value)}", name)
        if not low <= value <= high:
            raise self.error(f"{name} {shown(value)} is out of range; allowed are {low:,} to {high:,}", name)
        return value

    def multiple(self, name: str, default: float, of: int) -> int:
        """Return `of` times a factor of the file, such as an expansion of the width. The product must be whole."""
        factor = self.data[name] if self.has(name) else default
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= MAX_SIZE:
            raise self.error(f"{name} must be a number above 0, and is {shown(factor)}", name)
        product = factor * of
        if abs(product - round(product)) > 1e-9 * product or round(product) < 1:
            raise self.error(f"{name} {shown(factor)} does not make {of:,} a whole number", name)
        return round(product)

    def _typed(self, name: str, kind: type[Any], expected: str, entries: type | None = None) -> Any:
        """Return the value of `name`, a `kind` (of `entries`, where true is no int), None where the file has none."""
        value = self.data.get(name)
        of_kind = isinstance(value, kind) and (entries is None or all(type(entry) is entries for entry in value))
        if value is not None and not of_kind:
            raise self.error(f"{name} must be {expected}, and is {shown(value)}", name)
        return value

    def nested(self, name: str) -> Config | None:
        """Return the object under `name` as a config of its own, or None where the file has none."""
        if self._typed(name, dict, "an object") is None:
            return None
        inner = Config(self.document, (*self.prefix, name))
        inner.notes, inner.defaults = self.notes, self.defaults
        return inner

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false, `default` where the file has neither."""
        value = self._typed(name, bool, "true or false")
        return default if value is None else bool(value)

    def integers(self, name: str) -> list[int]:
        """Return a list of integers, empty where the file has none."""
        return list(self._typed(name, list, "a list of integers", int) or [])

    def strings(self, name: str) -> list[str] | None:
        """Return a list of strings, or None where the file has none."""
        value: list[str] | None = self._typed(name, list, "a list of words", str)
        return value

    def refuse(self, name: str, because: str) -> None:
        """Raise InputError if the file sets `name` to anything but null, false, 0 or an empty list."""
        if self.data.get(name):
            raise self.error(f"{name} {shown(self.data[name])} is not supported: {because}", name)

    def check_divides(self, name: str, value: int, total_name: str, total: int) -> None:
        """Raise InputError, at `name`, unless its value divides that of `total_name`."""
        if total % value:
            raise self.error(f"{name} {value} does not divide {total_name} {total}", name)

    @property
    def layer_count(self) -> int:
        return self.integer("num_hidden_layers", "n_layer", high=MAX_CONFIG_LAYERS)
