"""`Swap`: which mixer takes the place of the others, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from powerplan.mixers import HeadShape


@dataclass(frozen=True)
class Swap:
    """A kind of mixer and the settings that it does not take over from the layer that it replaces.

    settings: pairs of field and value in the order in which a text writes them.
    """

    kind: str
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, kind: str, shape: HeadShape | None = None, **settings: Any) -> Swap:
        """Return the swap to `kind` with these settings, and the heads of `shape` where one is given."""
        heads = asdict(shape) if shape else {}
        # A text names the degree or the window first, then the heads, then the rest.
        first = {field: settings.pop(field) for field in ("p", "window") if field in settings}
        return cls(kind, tuple((first | heads | settings).items()))

    @classmethod
    def attention(cls, shape: HeadShape | None = None, window: int | None = None) -> Swap:
        """Return the swap to softmax attention, over the last `window` keys where one is given."""
        return cls.of("attention", shape) if window is None else cls.of("attention", shape, window=window)

    @classmethod
    def power(cls, p: int, shape: HeadShape | None = None, normalize: bool = True) -> Swap:
        """Return the swap to power attention of degree p."""
        return cls.of("power", shape, p=p) if normalize else cls.of("power", shape, p=p, normalize=False)

    @property
    def fields(self) -> dict[str, Any]:
        """The settings by field."""
        return dict(self.settings)

    def describe(self) -> str:
        """Return the kind with its degree or window, for a table: "window 4,096", "power p=2"."""
        if "window" in self.fields and self.kind == "attention":
            return f"window {self.fields['window']:,}"
        return self.kind + (f" p={self.fields['p']}" if "p" in self.fields else "")
