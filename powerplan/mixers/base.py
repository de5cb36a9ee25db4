"""What every mixer and FFN answers: its parameters, state and FLOPs, and how it stands in for another kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import gcd
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_type_hints

import msgspec

from powerplan.errors import InputError
from powerplan.mixers.formulas import Convention, Formulas, Rational, Term, term
from powerplan.mixers.kept import Keeping
from powerplan.mixers.state_size import StateSize
from powerplan.units import MAX_CONTEXT

MAX_SIZE = 10**9
"""The largest width, count or vocabulary that a spec may have; a larger number is a mistake, not a model."""

Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
"""A width or a count."""

Width = Annotated[int, msgspec.Meta(ge=0, le=1024)]
"""The width of a short convolution in tokens; 0 stands for no convolution."""

Window = Annotated[int, msgspec.Meta(ge=1, le=MAX_CONTEXT)]
"""A length in tokens; a spec may write it as a size such as "4k"."""

RECURRENT_BYTES = 4
"""Bytes per element of recurrent state in fp32, as the kernels and the reference implementations keep it."""

SAME = 0
"""Default of a size that is the same as another field's; `Part.same_as` names that field."""


@dataclass(frozen=True)
class HeadShape:
    """Heads of one layer: `heads` query heads share `kv_heads` key/value heads.

    head_dim counts the features of a key, v_head_dim those of a value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int

    def describe(self) -> str:
        """Return "6 heads of 128", or "32 (8 kv) heads of 192/128" where heads are shared and values are shorter."""
        dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}/{self.v_head_dim}"
        shared = "" if self.heads == self.kv_heads else f" ({self.kv_heads} kv)"
        return f"{self.heads}{shared} heads of {dims}"

    def label(self) -> str:
        """Return "6x128", or "32x128/8" where 8 key/value heads are shared: the name in a table."""
        return f"{self.heads}x{self.head_dim}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")


class Inherited(NamedTuple):
    """What a new mixer takes from the one that it replaces: its fields, and remarks on what changes besides."""

    fields: dict[str, Any]
    remarks: tuple[str, ...] = ()


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


class Block(Keeping, Part, frozen=True, kw_only=True):
    """A mixer or an FFN: a part of a spec that has parameters.

    source: papers and code that the formulas follow, with section and equation; `--explain` prints it.
    letters: the letters of the formulas, in the order in which `--explain` lists them, and the field that each stands
    for. m, the hidden size of the model, has none.
    whole_widths: the fields that grow in proportion to the hidden size and must stay whole numbers.
    rounded_widths: the fields that grow with it to the nearest integer, at least 1.
    """

    source = ""
    letters = ""
    whole_widths: ClassVar[tuple[str, ...]] = ()
    rounded_widths: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str:
        """The word that names this class in a spec."""
        return str(self.__struct_config__.tag)

    def whole_sizes(self) -> dict[str, int]:
        """Return the `whole_widths` and their values."""
        return {field: getattr(self, field) for field in self.whole_widths}

    def widened(self, factor: Fraction) -> Self:
        """Return this block for a model whose hidden size is `factor` times as large."""
        sizes = {field: int(size * factor) for field, size in self.whole_sizes().items()}
        for field in self.rounded_widths:
            if getattr(self, field):
                sizes[field] = max(1, round(getattr(self, field) * factor))
        return msgspec.structs.replace(self, **sizes)

    def terms(self, formulas: Formulas, **values: Rational) -> tuple[Term, ...]:
        """Evaluate those of `formulas` that are not empty, with `values` for letters beside or in place of fields."""
        fields = _fields_of(self.letters).items()
        symbols = {letter: int((field and getattr(self, field)) or 0) for letter, field in fields} | values
        return tuple(term(component, formula, symbols) for component, formula in formulas if formula)

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that activations are multiplied with; each takes 2 weight FLOPs per token."""
        return self.terms(self.matmul_formulas(), m=hidden)

    def matmul_formulas(self) -> Formulas:
        raise NotImplementedError

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        """Return component, count, rows and columns of the matrices of those components whose shapes are stated.

        idle: whether experts that a token does not choose count.
        """
        return ()

    def part_of(self, component: str) -> str:
        """Return the part of a model, as rules of a quantization name it, that a component of the matmuls is in."""
        return "mixers"

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that a token uses outside matrix products: norms, biases, sinks."""
        return self.terms(self.other_formulas(), m=hidden)

    def other_formulas(self) -> Formulas:
        return ()

    def idle_terms(self, hidden: int) -> tuple[Term, ...]:
        """Return the parameters that are stored and that a token does not use: experts that are not chosen."""
        return ()

    def describe(self) -> str:
        """Return the name that reports use, such as "attention, window 4,096"."""
        return self.kind.replace("_", " ")


@cache
def _fields_of(letters: str) -> dict[str, str]:
    return {letter: field for letter, _, field in (pair.partition("=") for pair in letters.split())}


class Mixer(Block, frozen=True, kw_only=True):
    """A sequence mixer: the part of a layer that has a state.

    state, flops: formulas of the state and of its FLOPs, where they have no parts.
    entry: formula of what a token appends to the cache; empty where the state is recurrent.
    looked_up, touched: formulas of what a token reads of the cache, or reads and writes of the state; empty for all.
    transition: formula of what a part of a sequence multiplies the state by, where devices pass it on beside the state.
    state_again: formula of the FLOPs per token of a part's own state, where kernels compute it before its outputs.
    chunked_differs: whether the chunked form has other state FLOPs than the recurrent form.
    steady: whether no token takes fewer state FLOPs, in the recurrent form, than one before it: their mean never falls.
    swappable: whether another kind can take the place of this one at the same weights.
    latent_heads: whether heads are expanded from a latent; as plain heads they would more than double the projections.
    sparse_reads: whether every key is kept on purpose and few are read: FLOPs are saved, and bytes are not.
    not_inherited: fields that `--mixer` sets or leaves unset, and never takes from the model.
    """

    whole_widths: ClassVar[tuple[str, ...]] = ("heads",)
    state = ""
    flops = ""
    entry = ""
    looked_up = touched = transition = state_again = ""
    chunked_differs = False
    steady = True
    swappable = False
    latent_heads = False
    sparse_reads = False
    not_inherited: ClassVar[frozenset[str]] = frozenset()

    @property
    def degree(self) -> int | None:
        """Degree of the power embedding that the state is made of, None without one."""
        return None

    @property
    def window_size(self) -> int | None:
        """Keys that a query attends to at most, in tokens; None without a window."""
        return None

    @property
    def keeps_every_key(self) -> bool:
        """Whether a query meets every earlier key: softmax attention or MLA, without a window or a selection."""
        return bool(self.entry) and not self.looked_up and self.window_size is None

    def direct_reach(self, context: int) -> int | None:
        """Return how many of the last tokens a query may meet themselves; None where it meets them in a state alone."""
        return min(context, self.window_size or context) if self.entry else None

    @property
    def kernel_problem(self) -> str | None:
        """Why powerplan.kernels cannot run this power attention; None where it can, and for all other kinds."""
        return None

    @property
    def restarts_after(self) -> int | None:
        """Tokens of a chunk, after which a query meets none of the keys before; None where it meets them on."""
        return None

    @property
    def family(self) -> str:
        """The word for this mixer in `recommend --only`: its kind, or "window" for attention with a window."""
        return self.kind

    @property
    def label(self) -> str:
        """The name of this mixer in a table: "window 4,096", "power p=2"."""
        return self.describe()

    @property
    def grows(self) -> bool:
        """Whether the state grows with the context without bound."""
        return self.state_size(2**40).elements > self.state_size(2**39).elements

    def own_heads(self) -> HeadShape | None:
        """Return the query and key/value heads of this layer; None where it has none in that sense."""
        return None

    def head_shape(self, hidden: int) -> HeadShape | None:
        """Return the heads that another kind takes at the same weights; None where there are none such."""
        return self.own_heads()

    def features_size(self) -> StateSize | None:
        """Return the state of one sequence without the normaliser, and the `entry` of a window of the same heads.

        None for kinds whose state is no sum of key features times values.
        """
        return None

    def width_divisor(self) -> int:
        """Return into how many equal parts this mixer can be cut when the model is made narrower."""
        return gcd(*self.whole_sizes().values())

    @classmethod
    def relatives(cls) -> type[Mixer]:
        """Return the class of kinds that have settings beside their heads in common with this one."""
        return cls

    @classmethod
    def from_same_heads(cls, mixer: Mixer) -> Inherited | None:
        """Return what this kind inherits from a mixer with the same projections; None where they are others."""
        return None

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited | None:
        """Return what this kind takes from latents of `mixer` or from the hidden size; None where it takes heads."""
        return None

    @classmethod
    def from_heads(cls, heads: dict[str, Any], settings: dict[str, Any], remark: str) -> Inherited:
        """Return what this kind takes from `heads`: heads, head_dim, v_head_dim (and bias) in the sense of attention.

        settings: other fields, as the first layer of this kind in the model has them. remark: what else changes.
        """
        fields = {field: value for field, value in (heads | settings).items() if field in cls.__struct_fields__}
        return Inherited(fields, (remark,))

    def plain_heads(self, kind: str) -> Inherited | None:
        """Return the heads of this layer as attention would have them, for another `kind`; None where it has none."""
        fields = ("heads", "head_dim", "v_head_dim")
        if not set(fields) <= set(self.__struct_fields__):
            return None
        remark = f"{kind} has projections of its own for the same heads: the weights change too"
        return Inherited({field: getattr(self, field) for field in fields}, (remark,))

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
        return self.terms(self.state_formulas(), **self.state_values(context))

    def state_formulas(self) -> Formulas:
        """Return the formulas of the cache; or those of the recurrent state and then of the last inputs kept for it."""
        return ((self.describe(), self.state),)

    def state_values(self, context: int) -> dict[str, int]:
        """Return the letters of the state that depend on the context: t, and what its last token meets."""
        means = self.flops_values(context, Convention(causal="full"))
        return {"t": context, **{letter: int(value) for letter, value in means.items()}}

    def state_size(self, context: int) -> StateSize:
        """Return the elements of the state of one sequence of `context` tokens, by how they are kept."""
        first, *others = (int(part.value) for part in self.state_terms(context))
        parts = (("entry", self.entry), ("looked_up", self.looked_up), ("touched", self.touched))
        sizes = {part.component: int(part.value) for part in self.terms(parts, **self.state_values(context))}
        if self.entry:
            return StateSize(cache=first + sum(others), **sizes)
        return StateSize(recurrent=first, recent=sum(others), **sizes)

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        """Return the state FLOPs per token, averaged over a sequence of `context` tokens."""
        return self.terms(self.flops_formulas(convention.form == "chunked"), **self.flops_values(context, convention))

    def least_state_flops_terms(self, first: int, last: int, convention: Convention) -> tuple[Term, ...]:
        """Return the least state FLOPs per token of all contexts of `first` to `last` tokens.

        Only for mixers that are `steady` or that restart, in a form that does not differ from the recurrent one.
        """
        return self.state_flops_terms(first, convention)

    def flops_formulas(self, chunked: bool) -> Formulas:
        return ((self.describe(), self.flops),)

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        """Return the letters of the state FLOPs that depend on the context: means over its tokens."""
        return {}

    def steps(self, **formulas: str) -> Formulas:
        """Return a formula for each step of the computation; keywords name the steps: query_state, update_state ..."""
        return tuple((f"{self.describe()}: {step.replace('_', ' ')}", formula) for step, formula in formulas.items())

    def decode_flops_terms(self, context: int) -> tuple[Term, ...]:
        """Return the state FLOPs to decode one token at position `context`, which attends to every key."""
        return self.state_flops_terms(context, Convention(causal="full"))

    def state_bytes(self, context: int, cache_bytes: Fraction, state_bytes: Rational = RECURRENT_BYTES) -> Fraction:
        """Return the bytes of the state, given the bytes per element of the cache and of the recurrent state."""
        return self.state_size(context).bytes(cache_bytes, state_bytes)

    def decode_bytes(self, context: int, cache_bytes: Fraction, state_bytes: Rational = RECURRENT_BYTES) -> Fraction:
        """Return the bytes of state that are read and written to decode one token at position `context`, batch 1.

        Of the cache, the part that is looked up is read once and one entry is appended. The part of the recurrent state
        that the token touches and the inputs of short convolutions are read and written.
        """
        return self.state_size(context).decode_bytes(cache_bytes, state_bytes)

    def decode_cache_bytes(self, context: int, cache_bytes: Fraction) -> Fraction:
        """Return the part of `decode_bytes` that belongs to the cache."""
        return self.state_size(context).decode_cache_bytes(cache_bytes)


def problem(field: str, message: str) -> InputError:
    """Return the error that `check` raises for a field; for a file it is reported at the place of that field."""
    return InputError(f"{field}: {message}")
