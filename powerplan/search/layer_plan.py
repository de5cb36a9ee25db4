"""A layer plan: which layers take which mixer, and the model that comes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import gcd

import msgspec

from powerplan.mixers import AnyMixer, Mixer
from powerplan.search.choices import Choice, Scope
from powerplan.spec import Layer, ModelSpec, group_layers
from powerplan.swap.value import AS_IS

LONGEST_PERIOD = 8
"""Layers after which a pattern still counts as regular: 3:1, 1:5, 5:3 are, 13 of 32 is not."""


def exception_places(layers: int, count: int) -> list[int]:
    """Return which of `layers` (from 0) are the `count` exceptions: the last of every k where that fits, else spread.

    3 of 12 are 3, 7, 11; 12 of 61 are every fifth; 5 of 12 are spread as evenly as whole numbers allow.
    """
    every = layers // count
    if layers // every == count:
        return list(range(every - 1, layers, every))
    return [index for index in range(layers) if (index + 1) * count // layers > index * count // layers]


def pattern_period(layers: int, count: int) -> int:
    """Return after how many layers the pattern of exceptions repeats; a remainder at the end does not count."""
    every = layers // count
    return every if layers // every == count else layers // gcd(layers, count)


def exceptions_by_mixer(scope: Scope, count: int) -> tuple[int, ...]:
    """Return how many of the `count` exceptions stand where each of the scope's distinct mixers stood.

    In whole numbers for each run, and not layer by layer: a model may have 100,000 layers.
    """
    layers = scope.layers
    # The exceptions among the first n layers are n * part // whole, for both ways to place them.
    every = layers // count
    part, whole = (1, every) if layers // every == count else (count, layers)
    few = [0] * len(scope.distinct)
    for mixer, repeats, first, step, *_ in scope.runs:
        few[mixer] += _floor_sum(repeats, whole, part * step, part * (first + 1))
        few[mixer] -= _floor_sum(repeats, whole, part * step, part * first)
    return tuple(few)


def _floor_sum(terms: int, divisor: int, factor: int, start: int) -> int:
    """Return the sum of (start + factor * j) // divisor over j from 0 to terms - 1, as Euclid's algorithm goes."""
    total = 0
    while True:
        whole, factor = divmod(factor, divisor)
        more, start = divmod(start, divisor)
        total += whole * terms * (terms - 1) // 2 + more * terms
        last = factor * terms + start
        if last < divisor:
            return total
        terms, start = divmod(last, divisor)
        divisor, factor = factor, divisor


@dataclass(frozen=True)
class LayerPlan:
    """`main` in all layers of a scope but `count` of them, which take `other`."""

    scope: Scope
    main: Choice
    other: Choice | None = None
    count: int = 0

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (self.main,) if self.other is None else (self.main, self.other)

    @property
    def layers(self) -> int:
        """The number of layers of the scope."""
        return self.scope.layers

    @property
    def is_mix(self) -> bool:
        return self.other is not None

    @property
    def unchanged(self) -> bool:
        return self.main.swap is None and self.other is None

    @property
    def families(self) -> frozenset[str]:
        """The families that its mixers belong to."""
        return self.main.families | self.other.families if self.other else self.main.families

    @property
    def regular(self) -> bool:
        """Whether the pattern repeats after LONGEST_PERIOD layers at most."""
        return not self.count or pattern_period(self.layers, self.count) <= LONGEST_PERIOD

    def text(self) -> str:
        """Return the plan in `--mixer` texts: "power:p=2", or "attention x8 + power:p=2 x24"."""
        rest = " in the layers whose state grows" if self.scope.partial else ""
        if self.other is None:
            return f"{self.main.text}{rest}"
        parts = sorted(((self.main, self.layers - self.count), (self.other, self.count)), key=lambda part: part[0].text)
        names = (choice.mixers[0].kind if choice.swap is None else choice.text for choice, _ in parts)
        return " + ".join(f"{name} x{count}" for name, (_, count) in zip(names, parts, strict=True)) + rest

    def label(self) -> str:
        """Return the plan for a table: "9 power p=2 6x128 + 3 power p=2", "window 7,084"."""
        if self.unchanged:
            return AS_IS
        if self.other is None:
            return f"{self.main.label}{self._growing}"
        return f"{self.layers - self.count} {self.main.label} + {self.count} {self.other.label}{self._growing}"

    def resized_label(self, spec: ModelSpec) -> str:
        """Return the plan in a resized model, with the heads that it has there: "16 power p=2 9x128 + 5 mla"."""
        if self.unchanged:
            return AS_IS
        chosen = {mixer.describe() for choice in self.choices for mixer in choice.mixers}
        counts: Counter[tuple[str, str]] = Counter()
        for mixer, count in spec.mixer_counts():
            if mixer.describe() in chosen:
                heads = mixer.own_heads()
                counts[mixer.label, f" {heads.label()}" if heads else ""] += count
        shapes = {shape for _, shape in counts}
        if len(counts) == 1:
            return "".join(*counts) + self._growing
        if len(shapes) == 1:
            names = " + ".join(f"{count} {name}" for (name, _), count in counts.items())
            return f"{names},{shapes.pop()}{self._growing}"
        return " + ".join(f"{count} {name}{shape}" for (name, shape), count in counts.items()) + self._growing

    @property
    def _growing(self) -> str:
        return " (growing)" if self.scope.marked else ""

    def build(self, spec: ModelSpec) -> ModelSpec:
        """Return the model with the plan's mixers in its layers."""
        if self.unchanged:
            return spec
        layers = [layer for group in spec.layers for layer in group.period * group.repeat]
        exceptions = set(exception_places(self.layers, self.count) if self.other else ())
        changed: dict[tuple[Mixer, Layer], Layer] = {}
        for index, (position, own) in enumerate(zip(self.scope.positions, self.scope.order(), strict=True)):
            mixer = (self.other if self.other and index in exceptions else self.main).mixers[own]
            assert isinstance(mixer, AnyMixer)
            own_layer = layers[position]
            layer = changed.get((mixer, own_layer))
            if layer is None:
                layer = changed[mixer, own_layer] = msgspec.structs.replace(own_layer, mixer=mixer)
            layers[position] = layer
        return msgspec.structs.replace(spec, layers=group_layers(layers))
