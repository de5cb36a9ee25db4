"""The base classes of mixers and FFNs, and the formulas that their parameters, FLOPs and states are given by.

A formula is Python arithmetic kept as text. The same text is evaluated for the number and printed by `--explain`,
so the explanation cannot differ from the computation. Values are ints and Fractions: exact, never a float.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
"""The largest width, count or vocabulary that a spec may have; a larger number is a mistake, not a model."""

Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
"""A width or a count."""

Width = Annotated[int, msgspec.Meta(ge=0, le=1024)]
"""The width of a short convolution in tokens; 0 stands for no convolution."""

Window = Annotated[int, msgspec.Meta(ge=1, le=MAX_CONTEXT)]
"""A length in tokens; a spec may write it as a size such as "4k"."""

SAME = 0
"""Default of a size that is the same as another field's; `Part.same_as` names that field."""

SYMBOLS = {
    "m": "hidden size",
    "V": "vocabulary",
    "T": "learned positions",
    "H": "query heads, or heads of a recurrent state",
    "G": "key/value heads",
    "k": "key head dim",
    "v": "value head dim",
    "t": "context",
    "keys": "mean keys a query sees",
    "kept": "tokens whose keys and values are kept",
    "D": "dimension of phi(k)",
    "z": "1 with the normaliser, else 0",
    "late": "share of tokens after the first chunk",
    "earlier": "mean keys of a query's own chunk before it",
    "solve": "mean FLOPs to invert a chunk's triangular matrix",
    "J": "query and key heads of a delta rule",
    "W": "width of the short convolution",
    "u": "rank of a gate",
    "M": "memory slots",
    "I": "inner width of a Mamba layer",
    "N": "state dim of a Mamba layer",
    "g": "groups that share B and C",
    "R": "rank of the step size",
    "levels": "states of the Fenwick tree",
    "asked": "mean states of the Fenwick tree a query meets",
    "rw": "rank of the decay",
    "ra": "rank of the in-context learning rate",
    "rv": "rank of the value residual",
    "rg": "rank of the output gate",
    "B": "state partitions",
    "chosen": "partitions a token writes and reads",
    "blocks": "blocks of keys, or a query's mean number of them",
    "picked": "mean keys in the blocks a query picks",
    "near": "mean keys in the window",
    "X": "indexer heads",
    "x": "indexer head dim",
    "top": "mean keys the indexer leaves a query",
    "q": "query LoRA rank",
    "L": "key/value LoRA rank",
    "n": "key head dim without position",
    "r": "key head dim with RoPE",
    "f": "FFN width",
    "E": "experts",
    "a": "active experts",
    "s": "width of the shared experts",
}
"""What each letter of a formula stands for. A formula with any other letter is refused when it is evaluated."""


@dataclass(frozen=True)
class Convention:
    """How FLOPs are counted; docs/accounting.md has the details.

    causal: "exact" counts the keys that a causal mask leaves, on average; "full" counts every key for every query.
    form: "recurrent" counts in proportion to the size of the state; "chunked" counts what a chunked kernel executes.
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
    """One summand: the component that it belongs to, its formula, the values of the letters, and its own value."""

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
    code = compile(formula, "<formula>", "eval")
    unknown = set(code.co_names) - SYMBOLS.keys()
    assert not unknown, f"{formula}: SYMBOLS does not say what {', '.join(sorted(unknown))} stands for"
    return code


def term(component: str, formula: str, symbols: Mapping[str, Rational]) -> Term:
    """Evaluate a formula exactly.

    Args:
        component: what the value belongs to, such as "projections".
        formula: arithmetic over letters of SYMBOLS; a constant of this package, never user input.
        symbols: the values of the letters.
    """
    value = eval(_compiled(formula), {"__builtins__": {}}, dict(symbols))
    assert isinstance(value, (int, Fraction)), f"{formula} is not exact: {value!r}"
    return Term(component, formula, symbols, value)


def total(terms: tuple[Term, ...]) -> Rational:
    """Return the exact sum of the values of `terms`."""
    return sum((summand.value for summand in terms), 0)


def mean_keys(context: int, causal: Causal, window: int | None = None) -> Fraction:
    """Return the mean number of keys that a query attends to, over all t positions of one sequence.

    "exact" is (t+1)/2; with a window of w keys, the token itself included, it is w(w+1)/(2t) + (t-w)w/t.
    "full" is t, or w with a window. A window longer than the context counts as no window.
    """
    t = context
    w = t if window is None else min(window, t)
    if causal == "full":
        return Fraction(w)
    return Fraction(w * (w + 1), 2 * t) + Fraction((t - w) * w, t)


def mean_keys_in_chunks(context: int, causal: Causal, chunk_size: int) -> Fraction:
    """Return the mean number of keys that a query attends to in its own chunk; the last chunk may be short."""
    t = context
    c = min(chunk_size, t)
    whole, rest = divmod(t, c)
    if causal == "full":
        return Fraction(whole * c * c + rest * rest, t)
    return Fraction(whole * c * (c + 1) + rest * (rest + 1), 2 * t)


def mean_solve(context: int, causal: Causal, chunk_size: int) -> Fraction:
    """Return the mean FLOPs per token to invert the unit triangular matrix of each chunk by forward substitution.

    Row i of a chunk (from 0) is multiplied by the i rows above it. As a dense product ("full") that takes 2 i^2 FLOPs,
    and i (i - 1) without the zeros above their diagonals ("exact"): about 2c^2/3 and c^2/3 per token.
    """

    def chunk(c: int) -> int:
        return c * (c - 1) * (2 * c - 1 if causal == "full" else c - 2) // 3

    whole, rest = divmod(context, chunk_size)
    return Fraction(whole * chunk(chunk_size) + chunk(rest), context)


@dataclass(frozen=True)
class StateSize:
    """State of one sequence in one layer, in elements.

    cache: keys and values, which grow with the context; in the cache's dtype.
    entry: what one token appends to the cache.
    recurrent: the recurrent state, in fp32; every token reads and writes it.
    recent: inputs of the last tokens, kept for short convolutions and token shifts; in the cache's dtype.
    looked_up: the part of `cache` that one token reads; None stands for all of it.
    touched: the part of `recurrent` that one token reads and writes; None stands for all of it.
    """

    cache: int = 0
    entry: int = 0
    recurrent: int = 0
    recent: int = 0
    looked_up: int | None = None
    touched: int | None = None

    @property
    def elements(self) -> int:
        return self.cache + self.recurrent + self.recent


RECURRENT_BYTES = 4
"""Bytes per element of recurrent state: fp32, as the kernels and the reference implementations keep it."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a spec: immutable, and validated when it is built. Types are strict and unknown keys are refused.

    same_as: for fields with the default SAME, the field whose value they take; filled in this order.
    Building a part raises InputError("field: problem"). For a file, validation.py adds file:line:column.
    """

    same_as: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        self.fill()
        for name, kind in _field_types(type(self)).items():
            try:
                msgspec.convert(getattr(self, name), kind)
            except msgspec.ValidationError as error:
                raise InputError(f"{name}: {error}") from None
        self.check()

    def fill(self) -> None:
        """Give each field that is SAME the value of the field that `same_as` names."""
        for name, other in self.same_as.items():
            if getattr(self, name) == SAME:
                self.set_field(name, getattr(self, other))

    def check(self) -> None:
        """Raise a `problem` if fields contradict each other."""

    def set_field(self, name: str, value: Any) -> None:
        """Set a field while the part is being built; afterwards it is frozen."""
        msgspec.structs.force_setattr(self, name, value)


@cache
def _field_types(part: type[Part]) -> dict[str, Any]:
    hints = get_type_hints(part, include_extras=True)
    return {name: hints[name] for name in part.__struct_fields__}


class Block(Part, frozen=True, kw_only=True):
    """A mixer or an FFN: a part of a spec that has parameters.

    source: papers and code that the formulas follow, with section and equation; `--explain` prints it.
    """

    source: ClassVar[str] = ""

    @property
    def kind(self) -> str:
        """The word that names this class in a spec."""
        return str(self.__struct_config__.tag)

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that activations are multiplied with, for hidden size m = `hidden`.

        Each takes 2 weight FLOPs per token.
        """
        raise NotImplementedError

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that a token uses outside matrix products: norms, biases, sinks."""
        return ()

    def idle_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that are stored and that a token does not use: experts that are not chosen."""
        return ()

    def describe(self) -> str:
        """Return the name that reports use, such as "attention, window 4,096"."""
        raise NotImplementedError


class Mixer(Block, frozen=True, kw_only=True):
    """A sequence mixer: the part of a layer that has a state.

    chunked_differs: whether the chunked form has other state FLOPs than the recurrent form.
    steady: whether state FLOPs per token, in the recurrent form, never fall as the context grows.
    """

    chunked_differs: ClassVar[bool] = False
    steady: ClassVar[bool] = True

    @classmethod
    def one_head(cls, head_dim: int, v_head_dim: int) -> Mixer | None:
        """Return a mixer of this kind that has one head of these key and value dims, and defaults for the rest.

        None if these dims do not determine the state: power attention also needs its degree, and MLA its ranks.
        """
        required = {field.name for field in msgspec.structs.fields(cls) if field.required}
        if required != {"heads", "head_dim"} or "v_head_dim" not in cls.__struct_fields__:
            return None
        build: Callable[..., Mixer] = cls
        return build(heads=1, head_dim=head_dim, v_head_dim=v_head_dim)

    def state_terms(self, context: int) -> tuple[Term, ...]:
        """Return the elements of the state of one sequence of `context` tokens, as formulas."""
        raise NotImplementedError

    def state_size(self, context: int) -> StateSize:
        """Return the elements of the state of one sequence of `context` tokens, by how they are kept."""
        raise NotImplementedError

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        """Return the state FLOPs per token, averaged over a sequence of `context` tokens."""
        raise NotImplementedError

    def step_terms(self, symbols: Mapping[str, Rational], **formulas: str) -> tuple[Term, ...]:
        """Return a term for each step of the computation; the keywords name the steps: query_state, update_state ..."""
        return tuple(
            term(f"{self.describe()}: {step.replace('_', ' ')}", formula, symbols) for step, formula in formulas.items()
        )

    def decode_flops_terms(self, context: int) -> tuple[Term, ...]:
        """Return the state FLOPs to decode one token at position `context`, which attends to every key."""
        return self.state_flops_terms(context, Convention(causal="full"))

    def state_bytes(self, context: int, cache_bytes: Fraction) -> Fraction:
        """Return the bytes of the state, with `cache_bytes` per element of the cache and fp32 recurrent state."""
        size = self.state_size(context)
        return (size.cache + size.recent) * cache_bytes + size.recurrent * RECURRENT_BYTES

    def decode_bytes(self, context: int, cache_bytes: Fraction) -> Fraction:
        """Return the bytes of state that are read and written to decode one token at position `context`, batch 1.

        Of the cache, the part that is looked up is read once and one entry is appended. The part of the recurrent state
        that the token touches and the inputs of short convolutions are read and written.
        """
        size = self.state_size(context)
        touched = size.recurrent if size.touched is None else size.touched
        constant = 2 * size.recent * cache_bytes + 2 * touched * RECURRENT_BYTES
        return self.decode_cache_bytes(context, cache_bytes) + constant

    def decode_cache_bytes(self, context: int, cache_bytes: Fraction) -> Fraction:
        """Return the part of `decode_bytes` that belongs to the cache."""
        size = self.state_size(context)
        read = size.cache if size.looked_up is None else size.looked_up
        return (read + size.entry) * cache_bytes


def problem(field: str, message: str) -> InputError:
    """Return the error that `check` raises for a field; for a file it is reported at the place of that field."""
    return InputError(f"{field}: {message}")
