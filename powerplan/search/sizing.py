"""Which model a budget of training FLOPs supports: shapes of the catalogue, each resized until 20 tokens per parameter
use the budget up, and what balances them there.

FLOPs and tokens follow the rule of `training.TOKENS_PER_PARAMETER` (Hoffmann et al. 2022, arXiv 2203.15556, Table 3): N
active parameters see 20 N tokens, each of which takes 3 times the forward FLOPs at the context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import islice
from math import log

import msgspec

from powerplan.accounting import Accounting
from powerplan.balance import verdict_of
from powerplan.dtypes import Dtypes
from powerplan.errors import InfeasibleError, InputError
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import Convention
from powerplan.mixers.formulas import convention_of
from powerplan.search.recommendation import recommend
from powerplan.search.request import Request
from powerplan.search.resize import resized_to
from powerplan.spec import MAX_NAME, ModelSpec
from powerplan.swap import with_mixer
from powerplan.swap.value import AS_IS
from powerplan.swap.windows import can_swap
from powerplan.training import TOKENS_PER_PARAMETER, TRAINING_PASSES, Budget

SHAPES = 3
"""Shapes that are resized at each context: those whose own training takes FLOPs nearest to the budget."""


@dataclass(frozen=True)
class Sized:
    """A shape of the catalogue at the size that a budget supports.

    shape: the name of the catalogue's model. mixer, label: what stands in its layers, as `--mixer` takes it and as a
        table shows it; "as it is" for the shape's own mixers, and the mixer that was asked for where one was.
    budget: the resized model at one context, and the tokens that the budget buys there.
    recommended: whether this is what to train of the shape at that context. A shape whose state takes more FLOPs than
        its weights is followed by itself with the mixers that balance it.
    """

    shape: str
    mixer: str
    label: str
    budget: Budget
    recommended: bool

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.budget.row.context

    @property
    def spec(self) -> ModelSpec:
        """The resized model."""
        return self.budget.accounting.spec


@dataclass(frozen=True)
class Sizing:
    """What a budget supports.

    rows: for each context the shapes nearest to the budget, nearest first.
    balanced: the nearest shapes as they are, each at the longest context at which its state takes no more FLOPs than
        its weights, where there is such a context.
    notes: remarks on what a mixer that was asked for made of the shapes.
    """

    total_flops: Fraction
    rows: tuple[Sized, ...]
    balanced: tuple[Sized, ...]
    notes: tuple[str, ...] = ()


def sizes_for(
    total_flops: Fraction,
    contexts: Sequence[int],
    *,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtypes: Dtypes | None = None,
) -> Sizing:
    """Return which models a budget supports at each context.

    The shapes are the dense models of the catalogue with softmax attention, windowed or not, in all layers.

    Args:
        total_flops: training FLOPs in all.
        contexts: tokens of a sequence.
        mixer: a mixer to put into every layer of every shape before it is resized, as `--mixer` takes it.
        convention, dtypes: how FLOPs and bytes are counted.

    Raises:
        InputError: `mixer` is none, or suits no shape.
        InfeasibleError: no shape can be made as small or as large as the budget asks for.
    """
    search = _Sizes(total_flops, mixer, convention_of(convention), dtypes or Dtypes())
    rows = tuple(row for context in dict.fromkeys(contexts) for row in search.rows(context))
    balanced = tuple(search.balanced())
    notes = dict.fromkeys(note for row in (*balanced, *rows) for note in search.notes.get(row.shape, ()))
    return Sizing(total_flops, rows, balanced, tuple(notes))


class _Sizes:
    """The sizes of one budget."""

    def __init__(self, total: Fraction, mixer: str | None, convention: Convention, dtypes: Dtypes) -> None:
        self.total, self.convention, self.dtypes = total, convention, dtypes
        self.shapes, self.notes = _shapes(mixer)
        self.own = AS_IS if mixer is None else mixer.strip()
        self._resized = cache(self._size_of)

    def rows(self, context: int) -> list[Sized]:
        """Return the nearest shapes at one context, each once or, with what balances it, twice."""
        shapes = islice(filter(None, (self._sized(name, own, context) for name, own in self._sizes(context))), SHAPES)
        rows = [row for shape in shapes for row in shape]
        if not rows:
            raise self._infeasible(context)
        return rows

    def balanced(self) -> Iterator[Sized]:
        """Yield the nearest shapes where they are balanced as they are."""
        for name, spec in islice(self._sizes(None), SHAPES):
            if (context := Accounting(spec, self.convention).balanced_context()) is not None:
                yield Sized(name, self.own, self.own, self._budget(spec, context), recommended=True)

    def _infeasible(self, context: int) -> InfeasibleError:
        nearest = self._nearest(context)[0]
        return InfeasibleError(
            f"no size of the catalogue's shapes takes {float(self.total):.4g} FLOPs at {context:,} tokens and "
            f"{TOKENS_PER_PARAMETER} tokens per parameter; {nearest} itself takes "
            f"{float(self._flops(self.shapes[nearest], context)):.4g}"
        )

    def _sizes(self, context: int | None) -> Iterator[tuple[str, ModelSpec]]:
        """Yield the shapes that have a size, nearest first, and that size; no two of one width and depth."""
        seen: set[tuple[int, int]] = set()
        for name in self._nearest(context):
            spec = self._resized(name, context)
            if spec is not None and (size := (spec.layer_count, spec.hidden_size)) not in seen:
                seen.add(size)
                yield name, spec

    def _nearest(self, context: int | None) -> list[str]:
        """Return the shapes, first those whose own training takes FLOPs nearest to the budget."""

        def distance(name: str) -> float:
            return abs(log(self._flops(self.shapes[name], context) / self.total))

        return sorted(self.shapes, key=distance)

    def _flops(self, spec: ModelSpec, context: int | None) -> Fraction:
        """Return the training FLOPs of 20 tokens per active parameter; with as much state as weights for None."""
        accounting = Accounting(spec, self.convention)
        weights = Fraction(accounting.weight_flops_per_token)
        state = weights if context is None else accounting.state_flops_per_token(context)
        return (weights + state) * TRAINING_PASSES * TOKENS_PER_PARAMETER * accounting.active_parameters.with_embeddings

    def _size_of(self, name: str, context: int | None) -> ModelSpec | None:
        spec = resized_to(self.shapes[name], lambda spec: self._flops(spec, context), self.total)
        return None if spec is None else _named(spec, name, self.own)

    def _budget(self, spec: ModelSpec, context: int) -> Budget:
        accounting = Accounting(spec, self.convention)
        return Budget(accounting, accounting.row(context, self.dtypes), self.total)

    def _sized(self, name: str, own: ModelSpec, context: int) -> list[Sized]:
        """Return a shape at the size of the budget, and with what balances it where its state is too heavy.

        Nothing where no size of the shape is balanced.
        """
        as_is = Sized(name, self.own, self.own, self._budget(own, context), recommended=True)
        wsfr = as_is.budget.row.wsfr
        if wsfr is None or verdict_of(wsfr, 1).side != "state":
            return [as_is]
        request = Request(contexts=[context], convention=self.convention, dtypes=self.dtypes, top=1)
        # A balanced model takes twice its weight FLOPs, whatever its mixers: it is searched at the size of that.
        size = self._resized(name, None)
        if size is None:
            return []
        best = recommend(size, request).recommended
        if best.plan.unchanged:
            return [as_is]
        spec = best.spec
        if not best.balanced and not best.plan.is_mix:  # It takes other FLOPs than twice its weights', at another size.
            spec = resized_to(spec, lambda spec: self._flops(spec, context), self.total) or spec
        budget = self._budget(_named(spec, name, best.label), context)
        other = Sized(name, best.mixer, best.label, budget, recommended=True)
        return [replace(as_is, recommended=False), other]


def _named(spec: ModelSpec, shape: str, mixers: str) -> ModelSpec:
    """Return a resized model under a name of its own, without what the catalogue says of the model of that shape."""
    name = f"{shape} at {spec.layer_count} x {spec.hidden_size}" + (f" with {mixers}" if mixers != AS_IS else "")
    return msgspec.structs.replace(spec, name=name[:MAX_NAME], aliases=(), published=None, source=None, note=None)


def _shapes(mixer: str | None) -> tuple[dict[str, ModelSpec], dict[str, list[str]]]:
    """Return the shapes by name, with a mixer in every layer where one is given, and the remarks on that.

    Learned position tables, which end GPT-2 at 1,024 tokens, are left out, and what the models were trained for. Of
    models that differ in RoPE alone, the first stands for all.
    """
    unlimited = {"position_embeddings": None, "trained_context": None}
    specs = {name: msgspec.structs.replace(catalogue_spec(name), **unlimited) for name in catalogue_names()}
    firsts: dict[ModelSpec, str] = {}
    for name, spec in specs.items():
        if _is_dense(spec):
            firsts.setdefault(msgspec.structs.replace(_named(spec, "", ""), rope=None), name)
    dense = {name: specs[name] for name in firsts.values()}
    if mixer is None:
        return dense, {}
    shapes: dict[str, ModelSpec] = {}
    notes: dict[str, list[str]] = {}
    problem: InputError | None = None
    for name, spec in dense.items():
        try:
            shapes[name], notes[name] = with_mixer(spec, mixer)
        except InputError as error:  # Settings such as a number of heads may suit other shapes.
            problem = problem or error
    if not shapes and problem is not None:
        raise problem
    return shapes, notes


def _is_dense(spec: ModelSpec) -> bool:
    """Whether a model has no mixture of experts, and softmax attention in every layer, with windows or without."""
    families = {mixer.family for mixer in spec.mixers()}
    return not spec.mixtures() and can_swap(spec) and families <= {"attention", "window"}
