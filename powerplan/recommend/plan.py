"""A plan: which layers take which mixer, and the model that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import msgspec

from powerplan.mixers import AnyMixer, Mixer
from powerplan.recommend.choices import Choice, Scope
from powerplan.spec import Layer, ModelSpec, group_layers
from powerplan.swaps import AS_IS

LONGEST_PERIOD = 8
"""Layers after which a pattern still counts as regular: 3:1, 1:5, 5:3 are, 13 of 32 is not."""


def places(layers: int, count: int) -> list[int]:
    """Return which of `layers` (from 0) are the `count` exceptions: the last of every k where that fits, else spread.

    3 of 12 are 3, 7, 11; 12 of 61 are every fifth; 5 of 12 are spread as evenly as whole numbers allow.
    """
    every = layers // count
    if layers // every == count:
        return list(range(every - 1, layers, every))
    return [index for index in range(layers) if (index + 1) * count // layers > index * count // layers]


def period(layers: int, count: int) -> int:
    """Return after how many layers the pattern of `places` repeats; a remainder at the end does not count."""
    every = layers // count
    return every if layers // every == count else layers // gcd(layers, count)


@dataclass(frozen=True)
class Plan:
    """`main` in all layers of a scope but `count` of them, which take `other`."""

    scope: Scope
    main: Choice
    other: Choice | None = None
    count: int = 0

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (self.main,) if self.other is None else (self.main, self.other)

    @property
    def is_mix(self) -> bool:
        return self.other is not None

    @property
    def unchanged(self) -> bool:
        return self.main.text == AS_IS and self.other is None

    @property
    def regular(self) -> bool:
        return not self.count or period(len(self.scope.positions), self.count) <= LONGEST_PERIOD

    def text(self) -> str:
        """Return the plan in `--mixer` texts: "power:p=2", or "attention x8 + power:p=2 x24"."""
        layers = len(self.scope.positions)
        rest = " in the layers whose state grows" if self.scope.partial else ""
        if self.other is None:
            return f"{self.main.text}{rest}"
        pieces = sorted(((self.main, layers - self.count), (self.other, self.count)), key=lambda piece: piece[0].text)
        return " + ".join(f"{self._name(item)} x{count}" for item, count in pieces) + rest

    @staticmethod
    def _name(item: Choice) -> str:
        return item.mixers[0].kind if item.text == AS_IS else item.text

    def mixers(self) -> dict[int, Mixer]:
        """Return the mixer of every layer of the scope, by position."""
        classes = self.scope.classes
        exceptions = set(places(len(self.scope.positions), self.count)) if self.other is not None else set()
        found = {}
        for index, (position, own) in enumerate(zip(self.scope.positions, self.scope.mixers, strict=True)):
            item = self.other if self.other is not None and index in exceptions else self.main
            found[position] = item.mixers[classes.index(own)]
        return found

    def build(self, spec: ModelSpec) -> ModelSpec:
        """Return the model with the plan's mixers in its layers."""
        if self.unchanged:
            return spec
        layers = [layer for group in spec.layers for _ in range(group.repeat) for layer in group.period]
        mixers = self.mixers()
        changed = [
            Layer(mixer=_any(mixers[position]), ffn=layer.ffn) if position in mixers else layer
            for position, layer in enumerate(layers)
        ]
        return msgspec.structs.replace(spec, layers=group_layers(changed))


def _any(mixer: Mixer) -> AnyMixer:
    assert isinstance(mixer, AnyMixer)
    return mixer
