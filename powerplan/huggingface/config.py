"""Typed access to a config.json. Each value is checked when it is read, and each error names its line and column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from powerplan.documents import Document, Step
from powerplan.errors import InputError, shown
from powerplan.mixers.base import MAX_SIZE

MAX_CONFIG_LAYERS = 10_000
"""The most layers that a config.json may have."""


def _all_of(kind: type) -> Callable[[Any], bool]:
    """Return a check for lists of `kind`; true and false are no integers."""
    return lambda value: isinstance(value, list) and all(type(entry) is kind for entry in value)


class Config:
    """A model config, or the part of it under the keys of `prefix`, such as ("text_config",).

    Methods that take several names of a key (`n_embd`, `hidden_size`) use the first that the file has. null means the
    same as absence wherever a default exists. Every method raises InputError, with the place of the value, where the
    value has another type or is out of range.

    Attributes:
        data: The keys and values.
        notes: Remarks for the user, in order. Nested configs share the list.
    """

    def __init__(self, document: Document, prefix: tuple[str, ...] = ()) -> None:
        self.document = document
        self.prefix = prefix
        data: Any = document.data
        for step in prefix:
            data = data[step]
        self.data: Mapping[str, Any] = data
        self.notes: list[str] = []

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

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """Return an integer from `low` to `high`. InputError if the file has none and there is no default."""
        value = self.optional_integer(*names, absent=default, low=low, high=high)
        value = default if value is None else value
        if value is not None:
            return value
        if names[0] in self.data:
            raise self.error(f"{self.family} needs {names[0]}, and it is null", names[0])
        raise self.error(f"{self.family} needs {names[0]}, and the file has none")

    def optional_integer(
        self, *names: str, absent: int | None = None, low: int = 1, high: int = MAX_SIZE
    ) -> int | None:
        """Return an integer from `low` to `high`, None where the file says null, `absent` where it has no such key."""
        for name in names:
            if name not in self.data:
                continue
            value = self.data[name]
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, int):
                raise self.error(f"{name} must be an integer, and is {shown(value)}", name)
            if not low <= value <= high:
                raise self.error(f"{name} {shown(value)} is out of range; allowed are {low:,} to {high:,}", name)
            return value
        return absent

    def multiple(self, *names: str, default: float, of: int) -> int:
        """Return `of` times a factor of the file, such as an expansion of the width. The product must be whole."""
        name = next((name for name in names if self.has(name)), names[0])
        factor = self.data.get(name, default)
        if factor is None:
            factor = default
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= MAX_SIZE:
            raise self.error(f"{name} must be a number above 0, and is {shown(factor)}", name)
        product = factor * of
        if abs(product - round(product)) > 1e-9 * product or round(product) < 1:
            raise self.error(f"{name} {shown(factor)} does not make {of:,} a whole number", name)
        return round(product)

    def _typed(self, name: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
        """Return the value of `name`, None where the file has none; an error names what was expected."""
        value = self.data.get(name)
        if value is not None and not is_valid(value):
            raise self.error(f"{name} must be {expected}, and is {shown(value)}", name)
        return value

    def nested(self, name: str) -> Config | None:
        """Return the object under `name` as a config of its own, or None where the file has none."""
        if self._typed(name, lambda value: isinstance(value, dict), "an object") is None:
            return None
        inner = Config(self.document, (*self.prefix, name))
        inner.notes = self.notes
        return inner

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false, `default` where the file has neither."""
        value = self._typed(name, lambda value: isinstance(value, bool), "true or false")
        return default if value is None else bool(value)

    def integers(self, name: str) -> list[int]:
        """Return a list of integers, empty where the file has none."""
        return list(self._typed(name, _all_of(int), "a list of integers") or [])

    def strings(self, name: str) -> list[str] | None:
        """Return a list of strings, or None where the file has none."""
        value: list[str] | None = self._typed(name, _all_of(str), "a list of words")
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
