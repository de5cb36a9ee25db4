"""Typed access to a config.json: every value is checked, and every complaint says where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerplan.documents import Document, Step
from powerplan.errors import InputError, shown
from powerplan.mixers.base import MAX_SIZE

MAX_CONFIG_LAYERS = 10_000


class Config:
    """A model config, or a config nested in another under `prefix` (such as text_config).

    Keys may have several names (`n_embd`, `hidden_size`), as transformers' attribute maps give them: the first that
    the file has counts. null means the same as absence wherever a default exists.
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
        if text not in self.notes:
            self.notes.append(text)

    def error(self, problem: str, *path: Step) -> InputError:
        """Return an InputError at `path`, for the caller to raise."""
        full = (*self.prefix, *path)
        return InputError(problem, self.document.where(full))

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """Return an integer within low..high; without a default the file must have it."""
        value = self.optional_integer(*names, absent=default, low=low, high=high)
        if value is None:
            value = default
        if value is None and names[0] in self.data:
            raise self.error(f"{self.family} needs {names[0]}, and it is null", names[0])
        if value is None:
            raise self.error(f"{self.family} needs {names[0]}, and the file has none")
        return value

    def optional_integer(
        self, *names: str, absent: int | None = None, low: int = 1, high: int = MAX_SIZE
    ) -> int | None:
        """Return an integer, or None where the file says null; `absent` where it says nothing."""
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
        """Return `of` times a factor of the file, such as an expansion of the hidden size; it must be whole."""
        name = next((name for name in names if self.data.get(name) is not None), names[0])
        factor = self.data.get(name, default)
        if factor is None:
            factor = default
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= MAX_SIZE:
            raise self.error(f"{name} must be a number above 0, and is {shown(factor)}", name)
        product = factor * of
        if abs(product - round(product)) > 1e-9 * product or round(product) < 1:
            raise self.error(f"{name} {shown(factor)} does not make {of:,} a whole number", name)
        return round(product)

    def nested(self, name: str) -> Config | None:
        """Return the object under `name` as a config of its own, or None where the file has none."""
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(f"{name} must be an object, and is {shown(value)}", name)
        inner = Config(self.document, (*self.prefix, name))
        inner.notes = self.notes
        return inner

    def boolean(self, name: str, default: bool) -> bool:
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, and is {shown(value)}", name)
        return value

    def integers(self, name: str) -> list[int]:
        """Return a list of integers, empty where the file has none."""
        value = self.data.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            raise self.error(f"{name} must be a list of integers, and is {shown(value)}", name)
        return value

    def words(self, name: str) -> list[str] | None:
        """Return a list of words, or None where the file has none."""
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            raise self.error(f"{name} must be a list of words, and is {shown(value)}", name)
        return value

    def refuse(self, name: str, because: str) -> None:
        """Raise if the file sets `name` to anything but null, false, 0 or an empty list."""
        if self.data.get(name):
            raise self.error(f"{name} {shown(self.data[name])} is not supported: {because}", name)

    @property
    def layer_count(self) -> int:
        return self.integer("num_hidden_layers", "n_layer", high=MAX_CONFIG_LAYERS)
