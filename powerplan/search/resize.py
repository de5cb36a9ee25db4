"""`--keep flops`: as many FLOPs per token as the model as it is, by more or fewer layers and heads.

Depth and width change together, so that width over depth stays as near as whole heads and layers allow. A size that is
tried is a sum of what each block costs at that width; only models that are shown are built.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from math import gcd, log
from operator import mul, sub
from typing import NamedTuple

import msgspec

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.longest import first_that
from powerplan.mixers import Mixer
from powerplan.mixers.block import Block
from powerplan.rope import Rope
from powerplan.search.choices import Choice, Scope, groups_of, scope_of
from powerplan.search.costs import Columns, Cost, CostBasis
from powerplan.search.layer_plan import LayerPlan, exceptions_by_mixer
from powerplan.spec import MAX_LAYERS, Layer, LayerGroup, ModelSpec

FLOPS_TOLERANCE = Fraction(1, 50)
"""Share by which the FLOPs may miss where that keeps the shape better: 2 %."""

MEASURE_TOLERANCE = Fraction(1, 20)
"""Likewise for the measure of `resized_to`, 5 %: training FLOPs grow with the sixth power of width and depth."""

GOAL_REACH = Fraction(5, 4)
"""Factor within which `resized_to` must come to its goal: a model of few heads and layers has no size in between."""

MOST_ASPECT_CHANGE = 2
"""Factor by which width over depth may change: few heads make coarse steps of width."""


class Size(NamedTuple):
    """The size of a model with a plan in its layers.

    depth: by what factor each group has more layers, before rounding. width: how many times the heads, the hidden size
    and the FFN it has. layers: all layers. exceptions: those of the plan.
    """

    depth: Fraction
    width: Fraction
    layers: int
    exceptions: int


@dataclass(frozen=True)
class _Depth:
    """A model of another depth: layers, their norms, the layers that a plan may change, counts of its other blocks."""

    layers: int
    norms: int
    scope: Scope
    others: tuple[int, ...]


class Resizer:
    """Finds for plans over one scope of `base` the size that takes `goal` FLOPs per token at the longest context."""

    def __init__(self, base: ModelSpec, scope: Scope, basis: CostBasis, goal: Fraction) -> None:
        self.base, self.basis, self.goal = base, basis, goal
        self._groups, self._members, self._partial = groups_of(base), set(scope.distinct), scope.partial
        self._others: dict[Block, int] = {}  # The blocks that stay, with their places.
        for _, period in self._groups:
            for block in _staying_blocks(period, self._members):
                self._others.setdefault(block, len(self._others))
        self._depth = cache(self._depth_of)
        self._flops = cache(self._flops_of)
        self._columns = cache(self._columns_of)
        self._frame = cache(self._frame_of)

    def resized(self, plan: LayerPlan) -> Size | None:
        """Return the size that suits a plan best; None where heads forbid it."""
        base, goal = self.base, self.goal
        same = Size(Fraction(1), Fraction(1), base.layer_count, plan.count)
        staying = [block for block in self._others if isinstance(block, Mixer)]
        parts = _width_parts(base, [*staying, *(mixer for mixer, _ in self._mixers(plan, same))])
        if parts is None:
            return None
        # FLOPs grow about as width^2 times depth, and both grow by the same factor.
        growth = (float(goal) / float(self.flops_per_token(plan, same))) ** (1 / 3)
        middle = round(parts * growth)
        sizes: list[tuple[bool, float, float, Size]] = []
        for heads in range(max(1, middle - 2), middle + 3):
            with suppress(InputError):  # A width that is out of range, or that a kind does not take.
                sizes += self._depths(plan, Fraction(heads, parts))
        return min(sizes, key=lambda size: size[:3])[3] if sizes else None

    def _depths(self, plan: LayerPlan, width: Fraction) -> Iterator[tuple[bool, float, float, Size]]:
        """Yield up to three depths at one width, each nearer to the goal, and before each what they are sorted by."""
        goal, depth, layers = self.goal, self.base.layer_count, self.base.layer_count
        head = self._head_flops(width)
        for _ in range(3):
            size = self._size(plan, depth, width)
            if size is None:
                break
            flops = self.flops_per_token(plan, size)
            miss = abs(float(flops / goal) - 1)
            aspect = float(width) / (size.layers / layers)
            if 1 / MOST_ASPECT_CHANGE <= aspect <= MOST_ASPECT_CHANGE:
                far = miss > FLOPS_TOLERANCE
                yield far, miss if far else abs(log(aspect)), miss, size
            before, depth = depth, max(1, round((goal - head) / (flops - head) * size.layers))
            if goal <= head or depth == before:
                break

    def flops_per_token(self, plan: LayerPlan, size: Size) -> Fraction:
        """Return the forward FLOPs per token, weights and state, of the model that `build` returns."""
        depth = self._depth(size.depth)
        flops = sum(map(mul, self._flops(None, size.width), depth.others))
        for choice, counts in self._split(plan, size):
            flops += sum(map(mul, self._flops(choice, size.width), counts))
        return Fraction(flops, 2 * self.basis.longest) + self._head_flops(size.width)

    def cost(self, plan: LayerPlan, size: Size) -> Cost:
        """Return the cost of the model that `build` returns."""
        cost = self.basis.of_frame(self._frame(size.width), self._depth(size.depth).norms)
        for blocks, counts in ((None, self._depth(size.depth).others), *self._split(plan, size)):
            if any(counts):
                cost = cost.plus(self._columns(blocks, size.width).times(counts))
        return cost

    def build(self, plan: LayerPlan, size: Size) -> ModelSpec:
        """Return the model of that size with the plan in its layers."""
        scope = self._depth(size.depth).scope
        return _widened(
            replace(plan, scope=scope, count=size.exceptions).build(_deeper(self.base, size.depth)), size.width
        )

    def _size(self, plan: LayerPlan, depth: int, width: Fraction) -> Size | None:
        """Return the size of about `depth` layers, the plan in the same proportion; None where there is none such."""
        factor = Fraction(depth, self.base.layer_count)
        deep = self._depth(factor)
        count = round(plan.count * Fraction(deep.scope.layers, plan.layers))
        if deep.layers > MAX_LAYERS or (plan.is_mix and not 0 < 2 * count <= deep.scope.layers):
            return None
        return Size(factor, width, deep.layers, count)

    def _depth_of(self, factor: Fraction) -> _Depth:
        groups = [(_repeats(repeat, factor), period) for repeat, period in self._groups]
        others = [0] * len(self._others)
        for repeat, period in groups:
            for block in _staying_blocks(period, self._members):
                others[self._others[block]] += repeat
        layers = sum(repeat * len(period) for repeat, period in groups)
        norms = sum(repeat * sum(map(self.base.norms_of, period)) for repeat, period in groups)
        return _Depth(layers, norms, scope_of(groups, self._members, self._partial), tuple(others))

    def _split(self, plan: LayerPlan, size: Size) -> list[tuple[Choice, tuple[int, ...]]]:
        """Return the choices of a plan, and for each in how many layers its mixers stand."""
        scope = self._depth(size.depth).scope
        if plan.other is None:
            return [(plan.main, scope.counts)]
        few = exceptions_by_mixer(scope, size.exceptions)
        return [(plan.main, tuple(map(sub, scope.counts, few))), (plan.other, few)]

    def _mixers(self, plan: LayerPlan, size: Size) -> list[tuple[Mixer, int]]:
        """Return the mixers of a plan, at the width of the base, and in how many layers they stand."""
        pairs = (zip(choice.mixers, counts, strict=True) for choice, counts in self._split(plan, size))
        return [(mixer, count) for own in pairs for mixer, count in own if count]

    def _flops_of(self, choice: Choice | None, width: Fraction) -> tuple[int, ...]:
        """Return 2t times the FLOPs per token of each mixer of a choice, or of the blocks that stay, at that width.

        t is the longest context.
        """
        hidden = self._frame(width).spec.hidden_size

        @cache
        def flops(block: Block) -> int:
            return self.basis.scaled_block_flops(block.widened(width), hidden)

        return tuple(map(flops, self._blocks(choice)))

    def _columns_of(self, choice: Choice | None, width: Fraction) -> Columns:
        """Return the costs of the same blocks."""
        frame = self._frame(width)
        return Columns([self.basis.of_block(block.widened(width), frame) for block in self._blocks(choice)])

    def _blocks(self, choice: Choice | None) -> Iterable[Block]:
        return choice.mixers if choice else self._others

    def _frame_of(self, width: Fraction) -> Accounting:
        """Return the base in another width, as far as it is no layer."""
        return Accounting(msgspec.structs.replace(self.base, hidden_size=int(self.base.hidden_size * width)))

    def _head_flops(self, width: Fraction) -> int:
        """Return the FLOPs outside layers: those of the LM head, as far as they count, and of the model's extras."""
        return self.basis.of_frame(self._frame(width), 0).weight_flops_per_token


def resized_alike(base: ModelSpec, size: Size) -> ModelSpec | None:
    """Return `base` with its own mixers in the width of `size` and about its depth; None where heads forbid it."""
    parts = _width_parts(base, base.mixers())
    width = Fraction(round(size.width * parts), parts) if parts else None
    return _widened(_deeper(base, Fraction(size.layers, base.layer_count)), width) if width else None


def resized_to(base: ModelSpec, measure: Callable[[ModelSpec], Fraction], goal: Fraction) -> ModelSpec | None:
    """Return `base` with its own mixers in the width and depth that bring `measure` to about `goal`.

    Width over depth stays as near to the base's as whole heads and layers allow, and within MOST_ASPECT_CHANGE of it.

    Args:
        measure: what grows with width and depth, and is above 0, such as FLOPs.
        goal: its wanted value. It may be missed by MEASURE_TOLERANCE where that keeps the shape better.

    Returns:
        The resized model, or None where heads forbid another width or no size comes within GOAL_REACH of the goal.
    """
    parts, depth = _width_parts(base, base.mixers()), base.layer_count
    if parts is None:
        return None

    @cache
    def sized(heads: int, layers: int) -> tuple[ModelSpec, float] | None:
        """Return the model of so many parts of the width and about so many layers, and its measure over the goal."""
        if layers > MAX_LAYERS:
            return None
        try:
            spec = _widened(_deeper(base, Fraction(layers, depth)), Fraction(heads, parts))
        except InputError:  # A width that is out of range, or that a kind does not take.
            return None
        return spec, float(measure(spec) / goal)

    def reaches(heads: int, layers: int) -> bool:
        model = sized(heads, max(1, layers))
        return model is None or model[1] >= 1

    middle = first_that(lambda heads: reaches(heads, round(Fraction(depth * heads, parts))))
    found: list[tuple[bool, float, float, ModelSpec]] = []
    for heads in range(max(1, middle - 2), middle + 3):
        layers = first_that(partial(reaches, heads))
        for model in filter(None, (sized(heads, count) for count in (layers - 1, layers) if count)):
            spec, reached = model
            miss, aspect = abs(log(reached)), abs(log(heads / parts / (spec.layer_count / depth)))
            if miss <= log(GOAL_REACH) and aspect <= log(MOST_ASPECT_CHANGE):
                far = miss > log(1 + MEASURE_TOLERANCE)
                found.append((far, miss if far else aspect, miss, spec))
    return min(found, key=lambda size: size[:3])[3] if found else None


def _repeats(repeat: int, factor: Fraction) -> int:
    """Return how often a group is repeated in a model with `factor` times the layers."""
    return max(1, round(repeat * factor))


def _deeper(spec: ModelSpec, factor: Fraction) -> ModelSpec:
    groups = tuple(msgspec.structs.replace(group, repeat=_repeats(group.repeat, factor)) for group in spec.layers)
    return msgspec.structs.replace(spec, layers=groups, rope=_rope_of(spec, groups))


def _rope_of(spec: ModelSpec, groups: Sequence[LayerGroup]) -> Rope | tuple[Rope, ...] | None:
    """Return the RoPE of a spec whose groups are repeated as often as `groups` say: each layer keeps its own."""
    if not any(rope.in_layers for rope in spec.rope_settings):
        return spec.rope
    old: list[int] = []  # The position in the spec of each layer.
    start = 0
    for before, after in zip(spec.layers, groups, strict=True):
        length = len(before.period)
        old += (
            start + min(time, before.repeat - 1) * length + at for time in range(after.repeat) for at in range(length)
        )
        start += before.repeat * length
    kept = []
    for rope in spec.rope_settings:
        covered = None if rope.in_layers is None else set(rope.in_layers)
        if covered is None:
            kept.append(rope)
        elif positions := tuple(new for new, position in enumerate(old) if position in covered):
            kept.append(msgspec.structs.replace(rope, in_layers=positions))
    return kept[0] if isinstance(spec.rope, Rope) and kept else tuple(kept)


def _width_parts(spec: ModelSpec, mixers: Iterable[Mixer]) -> int | None:
    """Return into how many equal parts the width divides, with whole heads in each; None for one part."""
    parts = gcd(spec.hidden_size, *(mixer.width_divisor() for mixer in mixers))
    return parts if parts > 1 else None


def _staying_blocks(period: tuple[Layer, ...], members: Container[Mixer]) -> list[Block]:
    """Return the blocks of some layers but for the mixers that are `members`."""
    blocks = [block for layer in period for block in layer.blocks]
    return [block for block in blocks if not (isinstance(block, Mixer) and block in members)]


def _widened(spec: ModelSpec, width: Fraction) -> ModelSpec:
    """Return the model with `width` times the heads, hidden size and FFN, all of which must be whole."""

    def wider(layer: Layer) -> Layer:
        mixer, ffn = layer.mixer, layer.ffn
        return msgspec.structs.replace(layer, mixer=mixer and mixer.widened(width), ffn=ffn and ffn.widened(width))

    return msgspec.structs.replace(spec.map_layers(wider), hidden_size=int(spec.hidden_size * width))
