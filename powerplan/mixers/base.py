"""What every mixer answers: its state and the FLOPs of it, its heads, and how it stands in for another kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Any, ClassVar, NamedTuple

import msgspec

from powerplan.mixers.block import Block
from powerplan.mixers.formulas import Convention, Formulas, Rational, Term
from powerplan.mixers.state_size import StateSize

RECURRENT_BYTES = 4
"""Bytes per element of recurrent state in fp32, as the kernels and the reference implementations keep it."""


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
        shared = "" if self.heads == self.kv_heads else f" ({self.kv_heads} kv)"
        return f"{self.heads}{shared} heads of {self.dims}"

    @property
    def dims(self) -> str:
        """The head dims in words: "128", or "192/128" where values are shorter than keys."""
        return f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}/{self.v_head_dim}"

    def label(self) -> str:
        """Return "6x128", or "32x128/8" where 8 key/value heads are shared: the name in a table."""
        return f"{self.heads}x{self.head_dim}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")


class Inherited(NamedTuple):
    """What a new mixer takes from the one that it replaces: its fields, and remarks on what changes besides."""

    fields: dict[str, Any]
    remarks: tuple[str, ...] = ()


class Mixer(Block, frozen=True, kw_only=True):
    """A sequence mixer: the part of a layer that has a state.

    state, flops: formulas of the state and of its FLOPs, where they have no parts.
    entry: formula of what a token appends to the cache; empty where the state is recurrent.
    entry_gates: formula of the part of `entry` that are gates of query heads; devices pass them on in fp32.
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
    entry = entry_gates = ""
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
    def gpu_kernel_problem(self) -> str | None:
        """Why plain torch alone runs this power or linear attention, on a GPU too; None for all else."""
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
