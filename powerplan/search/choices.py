"""What a layer may take instead of its mixer, and which layers may take it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from powerplan.dims import KERNEL_DEGREES
from powerplan.mixers import MIXERS, HeadShape, Mixer
from powerplan.spec import ModelSpec
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


@dataclass(frozen=True)
class Scope:
    """The layers that a plan may change: their positions (from 0) and their mixers.

    partial: the model has layers with a mixer besides. marked: other plans change all layers, so the name of a plan
    over this scope says that some stay.
    """

    positions: tuple[int, ...]
    mixers: tuple[Mixer, ...]
    partial: bool
    marked: bool = False

    @cached_property
    def distinct(self) -> tuple[Mixer, ...]:
        """The distinct mixers, in order of first use."""
        return tuple(dict.fromkeys(self.mixers))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """In how many layers each of the distinct mixers stands."""
        return tuple(map(self.mixers.count, self.distinct))


def whole_scope(spec: ModelSpec) -> Scope:
    """Return all layers with a mixer, whether or not another kind can take its place."""
    layers = spec.mixers_by_position()
    return Scope(tuple(position for position, _ in layers), tuple(mixer for _, mixer in layers), partial=False)


def scopes(spec: ModelSpec) -> list[Scope]:
    """Return all layers with a mixer; and, in a hybrid, those alone whose state grows with the context.

    A scope with a mixer that no other kind can replace is left out.
    """
    whole = whole_scope(spec)
    growing = [layer for layer in spec.mixers_by_position() if layer[1].grows]
    scopes = [whole] if can_swap(spec) else []
    if 0 < len(growing) < len(whole.mixers) and all(mixer.swappable for _, mixer in growing):
        positions, mixers = zip(*growing, strict=True)
        scopes.append(Scope(positions, mixers, partial=True, marked=bool(scopes)))
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
    def has_kernel(self) -> bool:
        """Whether powerplan.kernels runs it, as far as it is power attention."""
        return all(mixer.kernel_problem is None for mixer in self.mixers)

    @property
    def plain(self) -> bool:
        """Whether it has the heads of the layers, and weights that are normalised as the kind has it."""
        return not (self.reshaped or self.fewer_kv_heads or (self.swap and "normalize" in self.swap.fields))


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
    swaps += [Swap.power(p, heads, normalize=False) for p in DEGREES if p % 2]
    choices = [choice_of(spec, swap, distinct) for swap in swaps]
    own = common_shape(distinct, spec.hidden_size)
    for shape in (own, *same_weights(own)) if own else ():
        reshaped = shape != own
        choices += [choice_of(spec, _power(p, shape), distinct, reshaped=True) for p in DEGREES if reshaped]
        for shared in fewer_kv_heads(shape):
            marks = {"reshaped": reshaped, "fewer_kv_heads": True}
            choices += [choice_of(spec, _power(p, shared), distinct, **marks) for p in DEGREES]
    return _distinct(choices)


def mix_choices(spec: ModelSpec, scope: Scope, context: int) -> list[Choice]:
    """Return the choices that are mixed: kinds with a kernel, heads of the same weights, windows under `context`."""
    distinct, heads = scope.distinct, replacement_heads(spec)
    stays = len(distinct) == 1 and distinct[0].family not in ("attention", "window", "linear", "power")
    swaps = [Swap.attention()] if heads is None else []
    swaps += [Swap.attention(heads, window) for window in WINDOWS if window < context]
    degrees = [p for p in KERNEL_DEGREES if p > 1]
    swaps += [Swap.of("linear", heads), *(_power(p, heads) for p in degrees)]
    choices = [staying(distinct)] if stays else []
    choices += [choice_of(spec, swap, distinct) for swap in swaps]
    own = common_shape(distinct, spec.hidden_size)
    shapes = same_weights(own) if own else []
    choices += [choice_of(spec, _power(p, shape), distinct, reshaped=True) for shape in shapes for p in degrees]
    return _distinct(choices)


def keeping_every_key(spec: ModelSpec, distinct: tuple[Mixer, ...]) -> Choice:
    """Return what each mixer would be if it kept every key: itself, or softmax attention of its heads."""
    full = choice_of(spec, Swap.attention(replacement_heads(spec)), distinct).mixers
    mixers = tuple(mixer if mixer.keeps_every_key else other for mixer, other in zip(distinct, full, strict=True))
    return Choice(None, mixers, "attention")


def _power(p: int, shape: HeadShape | None) -> Swap:
    return Swap.power(p, shape, normalize=p % 2 == 0)


def _distinct(choices: list[Choice]) -> list[Choice]:
    """Return the choices without those that make the same of every layer as an earlier one."""
    first: dict[tuple[Mixer, ...], Choice] = {}
    for choice in choices:
        first.setdefault(choice.mixers, choice)
    return list(first.values())
