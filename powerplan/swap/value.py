"""`Swap`: which mixer takes the place of the others, read and written as `--mixer` takes it: power:p=2,gated=true."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from powerplan.choices import Unknown
from powerplan.dims import odd_degree
from powerplan.errors import InputError, parameter, shown
from powerplan.lists import parse_settings
from powerplan.mixers import MIXERS, HeadShape, allowed_kinds
from powerplan.spec import LENGTHS
from powerplan.units import parse_context

AS_IS = "as it is"
"""The text that stands for no swap."""

KINDS = sorted(MIXERS)


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
    def power(cls, p: int, shape: HeadShape | None = None) -> Swap:
        """Return the swap to power attention of degree p as kernels run it: without the normaliser where p is odd."""
        return cls.of("power", shape, p=p, normalize=False) if odd_degree(p) else cls.of("power", shape, p=p)

    @classmethod
    def solving(cls, unknown: Unknown, value: int, shape: HeadShape | None = None) -> Swap | None:
        """Return the swap that a window or degree `value` in every layer means; None for a context, which is none."""
        if unknown == "context":
            return None
        return cls.attention(shape, value) if unknown == "window" else cls.power(value, shape)

    @property
    def fields(self) -> dict[str, Any]:
        """The settings by field."""
        return dict(self.settings)

    def describe(self) -> str:
        """Return the kind with its degree or window, for a table: "window 4,096", "power p=2"."""
        if "window" in self.fields and self.kind == "attention":
            return f"window {self.fields['window']:,}"
        return self.kind + (f" p={self.fields['p']}" if "p" in self.fields else "")


def swap_text(swap: Swap | None) -> str:
    """Return a swap as `--mixer` takes it; "as it is" for none."""
    if swap is None:
        return AS_IS
    if swap.kind == "attention" and swap.fields.keys() == {"window"}:
        return f"window:{swap.fields['window']}"
    settings = (f"{field}={str(value).lower()}" for field, value in swap.settings)
    return f"{swap.kind}:{','.join(settings)}" if swap.settings else swap.kind


def parse_swap(text: str) -> Swap:
    """Return the swap that a text describes.

    Args:
        text: a kind, or kind:field=value,...; "window:4096" is attention with that window. Lengths may be sizes ("4k").

    Raises:
        InputError: for an unknown kind or field, one that is given twice, power without p, a window without its size.
    """
    kind, _, rest = text.strip().partition(":")
    where = parameter("mixer")
    if kind == "window" and not rest:
        raise InputError("window needs its size; write window:4096", where)
    if kind == "window":
        return Swap.attention(window=parse_context(rest, f"{where} window"))
    if kind not in KINDS:
        raise InputError(f"{shown(kind)} is not a mixer{allowed_kinds(kind, [*KINDS, 'window'])}", where)
    allowed = sorted(MIXERS[kind].__struct_fields__)
    texts = parse_settings(rest, allowed, where, _example(kind, rest), of=f"a setting of {kind}") if rest else {}
    settings = {
        field: parse_context(value, f"{where} {field}") if field in LENGTHS else _value(value)
        for field, value in texts.items()
    }
    if kind == "power" and "p" not in settings:
        raise InputError("power needs its degree; write power:p=2", where)
    return Swap(kind, tuple(settings.items()))


def _example(kind: str, rest: str) -> str:
    """Return a swap to `kind` as a message shows it: where the `rest` is a number, it was meant as the degree."""
    values = {"p": rest if re.fullmatch("[0-9]", rest) else "2", "heads": "8", "inner_size": "2048"}
    settings = [f"{field}={value}" for field, value in values.items() if field in MIXERS[kind].__struct_fields__]
    return f"{kind}:{settings[0]}"


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,4000}", text) else text
