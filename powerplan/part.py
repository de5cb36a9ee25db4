"""`Part`, the base of the parts of a spec and of the rows of packaged tables: checked when built, immutable then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, get_type_hints

import msgspec

from powerplan.errors import InputError
from powerplan.units import MAX_CONTEXT

MAX_SIZE = 10**9
"""The largest width, count or vocabulary that a spec may have; a larger number is a mistake, not a model."""

Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
"""A width or a count."""

MAX_WIDTH = 1024
"""The largest width of a short convolution."""

Width = Annotated[int, msgspec.Meta(ge=0, le=MAX_WIDTH)]
"""The width of a short convolution in tokens; 0 stands for no convolution."""

Window = Annotated[int, msgspec.Meta(ge=1, le=MAX_CONTEXT)]
"""A length in tokens; a spec may write it as a size such as "4k"."""

Position = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]
"""The position of a layer in a model, from 0."""

SAME = 0
"""Default of a size that is the same as another field's; `Part.same_as` names that field."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a spec: immutable, and validated when it is built. Types are strict and unknown keys are refused.

    same_as: for fields with the default SAME, the field whose value they take; filled in this order.
    Building a part raises InputError("field: problem"). For a file, validation.py adds file:line:column.
    """

    same_as: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name, other in self.same_as.items():
            if getattr(self, name) == SAME:
                msgspec.structs.force_setattr(self, name, getattr(self, other))
        names, kinds, together = _field_types(type(self))
        try:
            msgspec.convert([getattr(self, name) for name in names], together)
        except msgspec.ValidationError:
            self._report(names, kinds)
        self.check()

    def _report(self, names: Iterable[str], kinds: Iterable[Any]) -> None:
        """Raise InputError for the first field that is not of its type."""
        for name, kind in zip(names, kinds, strict=True):
            try:
                msgspec.convert(getattr(self, name), kind)
            except msgspec.ValidationError as error:
                raise InputError(f"{name}: {error}") from None

    def check(self) -> None:
        """Raise a `problem` if fields contradict each other."""


@cache
def _field_types(part: type[Part]) -> tuple[tuple[str, ...], tuple[Any, ...], type[msgspec.Struct]]:
    """Return the names of a part's fields, their types, and a type of them all together.

    msgspec keeps what it knows of a struct's fields. What it knows of a bare type, it finds out at each call: 45 us for
    AnyMixer, of 100,000 layers.
    """
    hints = get_type_hints(part, include_extras=True)
    kinds = tuple(hints[name] for name in part.__struct_fields__)
    fields = list(zip(part.__struct_fields__, kinds, strict=True))
    return part.__struct_fields__, kinds, msgspec.defstruct(f"{part.__name__}Fields", fields, array_like=True)


def problem(field: str, message: str) -> InputError:
    """Return the error that `check` raises for a field; for a file it is reported at the place of that field."""
    return InputError(f"{field}: {message}")


def check_in_layers(positions: tuple[int, ...] | None) -> None:
    """Raise InputError unless the positions of layers in a field `in_layers` rise, each once; None stands for all."""
    if positions is not None and list(positions) != sorted(set(positions)):
        raise problem("in_layers", "lists layers in rising order, each once")
