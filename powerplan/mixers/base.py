"""What every mixer and FFN answers, and the formulas that they answer with.

A formula is Python arithmetic kept as text. The same text is evaluated for the number and printed by `--explain`,
so what is explained cannot differ from what is computed. Values are ints and Fractions: exact, never a float.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from types import CodeType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import msgspec

from powerplan.errors import InputError
from powerplan.units import MAX_CONTEXT

Rational = int | Fraction
Causal = Literal["exact", "full"]
Form = Literal["recurrent", "chunked"]

MAX_SIZE = 10**9
"""Largest width, count or vocabulary accepted in a spec; a larger one is a typing error, not a model."""

Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
"""A width or a count."""

Window = Annotated[int, msgspec.Meta(ge=1, le=MAX_CONTEXT)]
"""A length in tokens; a YAML may write it as a size such as "4k"."""

SAME = 0
"""Default of a size that is taken from another field (kv_heads from heads, v_head_dim from head_dim)."""

SYMBOLS = {
    "m": "hidden size",
    "V": "vocabulary",
    "T": "learned positions",
    "H": "query heads",
    "G": "key/value heads",
    "k": "key head dim",
    "v": "value head dim",
    "t": "context",
    "keys": "mean keys a query sees",
    "kept": "tokens whose keys and values are kept",
    "D": "dimension of phi(k)",
    "z": "1 with the normaliser, else 0",
    "late": "share of tokens after the first chunk",
    "q": "query LoRA rank",
    "L": "key/value LoRA rank",
    "n": "key head dim without position",
    "r": "key head dim with RoPE",
    "f": "FFN width",
    "E": "experts",
    "a": "active experts",
    "s": "width of the shared experts",
}
"""What the letters of the formulas stand for."""


@dataclass(frozen=True)
class Convention:
    """What is counted: the same for every number of one answer.

    causal: "exact" counts the mean keys of a causal mask, "full" the whole context (or window) for every query.
    form: "recurrent" is the cost proportional to state size; "chunked" what a chunked kernel executes.
    lm_head: whether the output projection to the vocabulary counts as weight FLOPs.
    """

    causal: Causal = "exact"
    form: Form = "recurrent"
    lm_head: bool = True

    def __post_init__(self) -> None:
        for name, value, allowed in (("causal", self.causal, get_args(Causal)), ("form", self.form, get_args(Form))):
            if value not in allowed:
                raise InputError(f"{name} must be {' or '.join(allowed)}, and is {value!r}")


@dataclass(frozen=True)
class Term:
    """One summand: the component it belongs to, its formula, the numbers put in, and the value."""

    component: str
    formula: str
    symbols: Mapping[str, Rational]
    value: Rational

    def substituted(self) -> str:
        """Return the formula with the numbers in place of the letters: 2·12·(64 + 64)·32,768.5."""

        def number(match: re.Match[str]) -> str:
            value = self.symbols.get(match[0])
            if value is None:
                return match[0]
            if isinstance(value, int) or value.denominator == 1:
                return f"{int(value):,}"
            text = f"{float(value):,.10g}"
            return text if Fraction(text.replace(",", "")) == value else f"({value.numerator:,}/{value.denominator:,})"

        return re.sub(r"[A-Za-z_]+", number, self.formula).replace("*", "·")


@cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, "<formula>", "eval")


def term(component: str, formula: str, symbols: Mapping[str, Rational]) -> Term:
    """Evaluate `formula` (a constant of this package, never user input) over `symbols` into a Term."""
    value = eval(_compiled(formula), {"__builtins__": {}}, dict(symbols))
    assert isinstance(value, (int, Fraction)), f"{formula} is not exact: {value!r}"
    return Term(component, formula, symbols, value)


def total(terms: tuple[Term, ...]) -> Rational:
    """Return the sum of the terms' values, exact."""
    return sum((item.value for item in terms), 0)


def mean_keys(context: int, causal: Causal, window: int | None = None) -> Fraction:
    """Return the mean number of keys that a query attends to, over the positions of one sequence.

    Exact causal: (t+1)/2 without a window; with a window of w keys (the token itself included), w <= t:
    w(w+1)/(2t) + (t-w)w/t. A window longer than the context is no window. "full": t, or min(t, w).
    """
    t = context
    w = t if window is None else min(window, t)
    if causal == "full":
        return Fraction(w)
    return Fraction(w * (w + 1), 2 * t) + Fraction((t - w) * w, t)


def mean_keys_in_chunks(context: int, causal: Causal, chunk_size: int) -> Fraction:
    """Return the mean number of keys of a query's own chunk, over a sequence in chunks (the last may be short)."""
    t = context
    c = min(chunk_size, t)
    whole, rest = divmod(t, c)
    if causal == "full":
        return Fraction(whole * c * c + rest * rest, t)
    return Fraction(whole * c * (c + 1) + rest * (rest + 1), 2 * t)


@dataclass(frozen=True)
class StateSize:
    """State of one sequence in one layer, in elements.

    cache grows with the context (keys and values, in the cache's dtype); entry is what one token appends to it.
    recurrent is of constant size, kept in fp32, read and written at every token.
    """

    cache: int = 0
    entry: int = 0
    recurrent: int = 0

    @property
    def elements(self) -> int:
        return self.cache + self.recurrent


RECURRENT_BYTES = 4
"""Bytes per element of recurrent state: fp32, as the kernels and the reference implementations keep it."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a spec, immutable and validated when built: types are strict, unknown keys are refused.

    Raises InputError ("field: what is wrong") when built in Python; validation.py gives file:line:column for a file.
    """

    def __post_init__(self) -> None:
        self.fill()
        for name, kind in _field_types(type(self)).items():
            try:
                msgspec.convert(getattr(self, name), kind)
            except msgspec.ValidationError as error:
                raise InputError(f"{name}: {error}") from None
        self.check()

    def fill(self) -> None:
        """Give fields that are SAME as another their value."""

    def check(self) -> None:
        """Raise `problem` where fields contradict each other."""

    def set_field(self, name: str, value: Any) -> None:
        """Set a field while the part is being built; a part is frozen from then on."""
        msgspec.structs.force_setattr(self, name, value)


@cache
def _field_types(part: type[Part]) -> dict[str, Any]:
    hints = get_type_hints(part, include_extras=True)
    return {name: hints[name] for name in part.__struct_fields__}


class Block(Part, frozen=True, kw_only=True):
    """A mixer or an FFN: a part that has parameters. `hidden` is the model's hidden size m throughout.

    matmul_terms: parameters that a token's activations are multiplied with; 2 FLOPs each are the weight FLOPs.
    other_terms: parameters that a token touches outside matrix products (norms, biases, sinks).
    idle_terms: parameters that are stored but not touched by a token (experts that are not chosen).
    """

    source: ClassVar[str] = ""

    @property
    def kind(self) -> str:
        """The word that names this class in a spec."""
        return str(self.__struct_config__.tag)

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        raise NotImplementedError

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        return ()

    def idle_terms(self, hidden: int) -> tuple[Term, ...]:
        return ()

    def describe(self) -> str:
        """Return the part in a few words, such as "attention, window 4096"."""
        raise NotImplementedError


class Mixer(Block, frozen=True, kw_only=True):
    """A sequence mixer: the part of a layer that has state.

    chunked_differs: whether the chunked form executes other FLOPs than the recurrent form counts.
    """

    chunked_differs: ClassVar[bool] = False

    def state_terms(self, context: int) -> tuple[Term, ...]:
        """Return the terms of the state's elements for one sequence of `context` tokens."""
        raise NotImplementedError

    def state_size(self, context: int) -> StateSize:
        """Return the state of one sequence of `context` tokens, in elements."""
        raise NotImplementedError

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        """Return the terms of the state FLOPs per token, averaged over a sequence of `context` tokens."""
        raise NotImplementedError

    def state_bytes(self, context: int, cache_bytes: Fraction) -> Fraction:
        """Return the bytes of the state, with `cache_bytes` per cached element and fp32 recurrent state."""
        size = self.state_size(context)
        return size.cache * cache_bytes + size.recurrent * RECURRENT_BYTES

    def decode_bytes(self, context: int, cache_bytes: Fraction) -> Fraction:
        """Return the state bytes moved to decode one token at position `context`, batch 1.

        The cache is read once and one entry is appended; recurrent state is read and written.
        """
        size = self.state_size(context)
        return (size.cache + size.entry) * cache_bytes + 2 * size.recurrent * RECURRENT_BYTES


def problem(field: str, message: str) -> InputError:
    """Return an error to raise in `check`; it is reported at `field`."""
    return InputError(f"{field}: {message}")
