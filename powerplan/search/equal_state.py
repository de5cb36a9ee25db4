"""Which window, degree or context holds as much of a sequence as another mixer in every layer, by exact search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from powerplan.accounting import Accounting, Row
from powerplan.choices import Unknown
from powerplan.dtypes import Dtypes
from powerplan.errors import InfeasibleError, InputError, parameter
from powerplan.longest import last_at_most
from powerplan.mixers import MIXERS, Convention, GroupedHeads, HeadShape, Mixer
from powerplan.mixers.formulas import Rational
from powerplan.mixers.power import MAX_DEGREE
from powerplan.spec import ModelSpec
from powerplan.swap import Swap, rebuilt, swap_text, swapped
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.windows import check_swappable, held_elements
from powerplan.units import MAX_CONTEXT

Size = Callable[[Mixer, int], Rational]
"""What is compared of a layer at a context: elements, or bytes."""


@dataclass(frozen=True)
class Held:
    """A model with one mixer in every layer, or as it is, and what it holds of one sequence.

    swap: the mixer; None for the model as it is. value: the window, degree or context; None for what was named.
    elements: keys and values or recurrent state, as `held_elements` counts them. bytes: all of the state, in the dtypes
    of cache and recurrent state. row: the numbers at the context that windows and degrees are judged at.
    """

    swap: Swap | None
    value: int | None
    elements: int
    bytes: Rational
    row: Row


@dataclass(frozen=True)
class EqualState:
    """The largest window, degree or context whose state is no more than that of another mixer.

    other: what was named. at, beyond: the value and the next one. value_by_bytes: the largest value where bytes are
    compared in place of elements; None where there is none. heads: those that stand for MLA's, so that the weights
    stay. remarks: what was assumed of the other mixer.
    """

    unknown: Unknown
    value: int
    value_by_bytes: int | None
    other: Held
    at: Held
    beyond: Held
    heads: HeadShape | None = None
    remarks: tuple[str, ...] = ()


def equal_state(
    spec: ModelSpec,
    unknown: Unknown,
    context: int,
    other: Swap,
    convention: Convention,
    dtypes: Dtypes,
) -> EqualState:
    """Return the largest window or degree in every layer, or context, that holds no more than `other` in every layer.

    A state of fixed size counts whole, one that grows as it is at `context`, where all are judged.

    Raises:
        InfeasibleError: no value holds so little, or every value does.
        InputError: the question does not fit this model.
    """
    question = _Question(spec, unknown, context, convention, dtypes)
    other = _with_heads(other, question.heads)
    named, remarks = swapped(spec, other)
    grows = any(mixer.grows for mixer in named.mixers())
    if unknown == "context" and grows:
        problem = f"{swap_text(other)} has a state that grows too; name one of fixed size, such as power:p=2"
        raise InputError(problem, parameter("equal_state"))
    elements, size = int(question.sum(named, held_elements)), question.sum(named, question.bytes)
    value = question.largest(held_elements, elements)
    if value is None:
        raise InfeasibleError(question.never(swap_text(other), elements))
    row = question.row(named, value if unknown == "context" else None)
    return EqualState(
        unknown=unknown,
        value=value,
        value_by_bytes=question.largest(question.bytes, size),
        other=Held(other, None, elements, size, row),
        at=question.held(value),
        beyond=question.held(value + 1),
        heads=question.heads,
        remarks=tuple(remarks),
    )


def _with_heads(swap: Swap, heads: HeadShape | None) -> Swap:
    """Return a swap with the heads that keep the weights of MLA, where it names none and its kind has such."""
    plain = issubclass(MIXERS[swap.kind], GroupedHeads)
    if heads is None or not plain or swap.fields.keys() & asdict(heads).keys():
        return swap
    return Swap.of(swap.kind, heads, **swap.fields)


@dataclass
class _Question:
    """What is searched for, in which model, and where it is judged."""

    spec: ModelSpec
    unknown: Unknown
    context: int
    convention: Convention
    dtypes: Dtypes

    def __post_init__(self) -> None:
        check_swappable(self.spec, self.unknown)
        self.heads = replacement_heads(self.spec)
        self.windows = swapped(self.spec, Swap.attention(self.heads, 1))[0] if self.unknown == "window" else self.spec

    def bytes(self, mixer: Mixer, context: int) -> Rational:
        return mixer.state_bytes(context, self.dtypes.cache_bytes, self.dtypes.state_bytes)

    def sum(self, spec: ModelSpec, size: Size, context: int | None = None) -> Rational:
        """Return the size of a model's state at `context`; where that is None, whole or at the question's context."""
        total: Rational = 0
        for mixer, count in spec.mixer_counts():
            place = context or (self.context if mixer.grows else MAX_CONTEXT)
            total += count * size(mixer, place)
        return total

    def swap(self, value: int) -> Swap | None:
        return Swap.solving(self.unknown, value, self.heads)

    def model(self, value: int) -> ModelSpec:
        """Return the model with a window or degree in every layer, or as it is."""
        if self.unknown == "window":  # Rebuilt once: a search asks for dozens of windows.
            return self.windows.map_mixers(lambda mixer: rebuilt(mixer, Swap.attention(window=value))[0])
        swap = self.swap(value)
        return self.spec if swap is None else swapped(self.spec, swap)[0]

    def size(self, size: Size, value: int) -> Rational:
        return self.sum(self.model(value), size, value if self.unknown == "context" else MAX_CONTEXT)

    def largest(self, size: Size, limit: Rational) -> int | None:
        """Return the largest value whose size is at most `limit`; None where there is none or no end."""
        if self.unknown == "p":
            fits = [p for p in range(1, MAX_DEGREE + 1) if self.size(size, p) <= limit]
            return len(fits) if 0 < len(fits) < MAX_DEGREE else None
        return last_at_most(limit, lambda value: self.size(size, value), MAX_CONTEXT)

    def row(self, spec: ModelSpec, context: int | None = None) -> Row:
        return Accounting(spec, self.convention).row(context or self.context, self.dtypes)

    def held(self, value: int) -> Held:
        """Return what a value holds."""
        model = self.model(value)
        row = self.row(model, value if self.unknown == "context" else None)
        elements = int(self.size(held_elements, value))
        return Held(self.swap(value), value, elements, self.size(self.bytes, value), row)

    def never(self, other: str, elements: int) -> str:
        """Return a sentence: no value is the answer, and what the value at the end of the range holds."""
        words = {"p": "degree", "window": "window", "context": "context"}[self.unknown]
        least = int(self.size(held_elements, 1))
        named = f"{other}, which holds {elements:,} elements"
        if least > elements:
            first = {"p": "p = 1", "window": "a window of one token", "context": "a context of one token"}[self.unknown]
            return f"no {words} holds as little as {named}: {first} holds {least:,}"
        if self.unknown == "p":
            most = int(self.size(held_elements, MAX_DEGREE))
            return f"no degree up to {MAX_DEGREE} holds more than {named}: p = {MAX_DEGREE} holds {most:,}"
        return f"no {words} holds more than {named}: the state of {self.spec.name} does not grow past it"
