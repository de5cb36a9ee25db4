"""What a layer may take instead of its mixer, and which layers may take it."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from powerplan.dims import KERNEL_DEGREES
from powerplan.mixers import MIXERS, Mixer
from powerplan.spec import Layer, ModelSpec
from powerplan.swap import Swap, first_relative, rebuilt, swap_text
from powerplan.swap.shapes import common_shape, fewer_kv_heads, replacement_heads, same_weights
from powerplan.swap.windows import can_swap

FAMILIES = ("attention", "window", "linear", "power", "mla")
"""Families of mixers that are always candidates."""

NAMED_KINDS = tuple(kind for kind in MIXERS if kind not in (*FAMILIES, "dsa"))
"""Kinds that are candidates only where `--only` names them: their projections, and so the weights, are others.

DSA is left out: its indexer needs MLA's latents.
"""

DEGREES = range(1, 7)
"""Degrees of power attention that are compared."""

WINDOWS = tuple(2**exponent for exponent in range(9, 41))
"""Windows that a layer mix may take, in tokens: whole blocks for any kernel."""


Group = tuple[int, tuple[Layer, ...]]
"""How often layers are repeated, and those layers."""


def groups_of(spec: ModelSpec) -> list[Group]:
    """Return the groups of layers of a model."""
    return [(group.repeat, group.period) for group in spec.layers]


class Run(NamedTuple):
    """Layers of one mixer at equal distances: from `first` on, `layers` of them, each `step` layers of the scope later.

    mixer: its place among the scope's distinct mixers. position, stride: as first and step, over all layers of a model.
    """

    mixer: int
    layers: int
    first: int
    step: int
    position: int
    stride: int


@dataclass(frozen=True)
class Scope:
    """The layers that a plan may change, as runs, and their distinct mixers in order of first use.

    partial: the model has layers with a mixer besides. marked: other plans change all layers, so the name of a plan
    over this scope says that some stay.
    """

    distinct: tuple[Mixer, ...]
    runs: tuple[Run, ...]
    partial: bool
    marked: bool = False

    def __hash__(self) -> int:  # Plans are keys by the thousand, and a model may have thousands of runs.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.distinct, self.runs, self.partial, self.marked))

    @cached_property
    def layers(self) -> int:
        """The number of layers."""
        return sum(run.layers for run in self.runs)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """In how many layers each of the distinct mixers stands."""
        counts = [0] * len(self.distinct)
        for run in self.runs:
            counts[run.mixer] += run.layers
        return tuple(counts)

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """The positions (from 0) of the layers in the model."""
        spans = (range(run.position, run.position + run.layers * run.stride, run.stride) for run in self.runs)
        return tuple(sorted(position for span in spans for position in span))

    def order(self) -> list[int]:
        """Return for each layer the place of its mixer among the distinct ones."""
        order = [0] * self.layers
        for run in self.runs:
            order[run.first : run.first + run.layers * run.step : run.step] = [run.mixer] * run.layers
        return order


def scope_of(groups: Iterable[Group], members: Container[Mixer], partial: bool, marked: bool = False) -> Scope:
    """Return the layers whose mixer is one of `members`."""
    places: dict[Mixer, int] = {}
    runs: list[Run] = []
    position = first = 0
    for repeat, period in groups:
        own = [(offset, layer.mixer) for offset, layer in enumerate(period) if layer.mixer and layer.mixer in members]
        for index, (offset, mixer) in enumerate(own):
            place = places.setdefault(mixer, len(places))
            runs.append(Run(place, repeat, first + index, len(own), position + offset, len(period)))
        first += repeat * len(own)
        position += repeat * len(period)
    return Scope(tuple(places), tuple(runs), partial, marked)


def whole_scope(spec: ModelSpec) -> Scope:
    """Return all layers with a mixer, whether or not another kind can take its place."""
    return scope_of(groups_of(spec), set(spec.mixers()), partial=False)


def scopes(spec: ModelSpec) -> list[Scope]:
    """Return all layers with a mixer; and, in a hybrid, those alone whose state grows with the context.

    A scope with a mixer that no other kind can replace is left out.
    """
    mixers = spec.mixers()
    growing = [mixer for mixer in mixers if mixer.grows]
    scopes = [whole_scope(spec)] if can_swap(spec) else []
    if 0 < len(growing) < len(mixers) and all(mixer.swappable for mixer in growing):
        scopes.append(scope_of(groups_of(spec), set(growing), partial=True, marked=bool(scopes)))
    return scopes


@dataclass(frozen=True)
class Choice:
    """One mixer that the layers of a scope may take.

    swap: what changes; None where layers stay as they are.
    mixers: what becomes of each of the scope's distinct mixers.
    family: the word of FAMILIES, or a kind, for the result.
    reshaped: its heads have other dims at the same weights.
    fewer_kv_heads: its query heads share fewer key/value heads, so the weights shrink.
    """

    swap: Swap | None
    mixers: tuple[Mixer, ...]
    family: str
    reshaped: bool = False
    fewer_kv_heads: bool = False

    def __hash__(self) -> int:  # Kept, as a choice of 500 distinct mixers is part of thousands of plans.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.swap, self.mixers, self.family, self.reshaped, self.fewer_kv_heads))

    @cached_property
    def text(self) -> str:
        """The swap as `--mixer` takes it."""
        return swap_text(self.swap)

    @cached_property
    def label(self) -> str:
        """The choice in a table: "power p=2 6x128", "window 4,096", "linear"."""
        mixer, heads = self.mixers[0], self.mixers[0].own_heads()
        if self.swap is None:
            return mixer.describe()
        return f"{mixer.label} {heads.label()}" if heads and (self.reshaped or self.fewer_kv_heads) else mixer.label

    @cached_property
    def families(self) -> frozenset[str]:
        """The families of its mixers."""
        return frozenset(mixer.family for mixer in self.mixers)

    @cached_property
    def degree(self) -> int | None:
        """Degree of power attention; None for all other families."""
        return self.mixers[0].degree if self.family == "power" else None

    @cached_property
    def kernel_order(self) -> int:
        """What of powerplan.kernels runs it, if it is power attention: 0 GPU kernels, 1 plain torch, 2 nothing."""
        if any(mixer.kernel_problem for mixer in self.mixers):
            return 2
        return int(any(mixer.gpu_kernel_problem for mixer in self.mixers))

    @property
    def plain(self) -> bool:
        """Whether it has the heads of the layers."""
        return not (self.reshaped or self.fewer_kv_heads)


def choice_of(spec: ModelSpec, swap: Swap, distinct: Iterable[Mixer], **marks: bool) -> Choice:
    """Return the choice that a swap means in layers of these distinct mixers, as `--mixer` builds them."""
    relative = first_relative(spec, swap.kind)
    mixers = tuple(rebuilt(mixer, swap, spec.hidden_size, relative)[0] for mixer in distinct)
    return Choice(swap, mixers, mixers[0].family, **marks)


def named_choices(spec: ModelSpec, scope: Scope, kinds: Iterable[str]) -> list[Choice]:
    """Return a choice for each of NAMED_KINDS among `kinds`."""
    return _distinct([choice_of(spec, Swap(kind), scope.distinct) for kind in NAMED_KINDS if kind in kinds])


def staying(distinct: tuple[Mixer, ...]) -> Choice:
    """Return the choice to leave layers as they are."""
    return Choice(None, distinct, distinct[0].family if distinct else "")


def uniform_choices(spec: ModelSpec, scope: Scope, windows: Iterable[int]) -> list[Choice]:
    """Return the choices for all layers of a scope at once: every family, every degree, every shape of the heads."""
    distinct, heads = scope.distinct, replacement_heads(spec)
    swaps = [Swap.attention(heads), *(Swap.attention(heads, window) for window in windows), Swap.of("linear", heads)]
    swaps += [Swap.power(p, heads) for p in DEGREES]
    choices = [choice_of(spec, swap, distinct) for swap in swaps]
    own = common_shape(distinct, spec.hidden_size)
    for shape in (own, *same_weights(own)) if own else ():
        reshaped = shape != own
        choices += [choice_of(spec, Swap.power(p, shape), distinct, reshaped=True) for p in DEGREES if reshaped]
        for shared in fewer_kv_heads(shape):
            marks = {"reshaped": reshaped, "fewer_kv_heads": True}
            choices += [choice_of(spec, Swap.power(p, shared), distinct, **marks) for p in DEGREES]
    return _distinct(choices)


def mix_choices(spec: ModelSpec, scope: Scope, context: int) -> list[Choice]:
    """Return the choices that are mixed: kinds with a kernel, heads of the same weights, windows under `context`."""
    distinct, heads = scope.distinct, replacement_heads(spec)
    stays = len(distinct) == 1 and distinct[0].family not in ("attention", "window", "linear", "power")
    swaps = [Swap.attention()] if heads is None else []
    swaps += [Swap.attention(heads, window) for window in WINDOWS if window < context]
    degrees = [p for p in KERNEL_DEGREES if p > 1]
    swaps += [Swap.of("linear", heads), *(Swap.power(p, heads) for p in degrees)]
    choices = [staying(distinct)] if stays else []
    choices += [choice_of(spec, swap, distinct) for swap in swaps]
    own = common_shape(distinct, spec.hidden_size)
    shapes = same_weights(own) if own else []
    choices += [choice_of(spec, Swap.power(p, shape), distinct, reshaped=True) for shape in shapes for p in degrees]
    return _distinct(choices)


def keeping_every_key(spec: ModelSpec, distinct: tuple[Mixer, ...]) -> Choice:
    """Return what each mixer would be if it kept every key: itself, or softmax attention of its heads."""
    full = choice_of(spec, Swap.attention(replacement_heads(spec)), distinct).mixers
    mixers = tuple(mixer if mixer.keeps_every_key else other for mixer, other in zip(distinct, full, strict=True))
    return Choice(None, mixers, "attention")


def _distinct(choices: list[Choice]) -> list[Choice]:
    """Return the choices without those that make the same of every layer as an earlier one."""
    first: dict[tuple[Mixer, ...], Choice] = {}
    for choice in choices:
        first.setdefault(choice.mixers, choice)
    return list(first.values())
