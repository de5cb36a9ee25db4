"""What a layer may take instead of its mixer, and which layers may take it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from powerplan.dims import KERNEL_DEGREES
from powerplan.mixers import MIXERS, Attention, Mixer, Power
from powerplan.spec import ModelSpec
from powerplan.swaps import (
    AS_IS,
    Shape,
    common_shape,
    default_shape,
    fewer_kv_heads,
    grows,
    is_softmax,
    mixer_text,
    power_text,
    runs_here,
    same_weights,
    swappable,
    window_text,
)
from powerplan.whatif import first_of, parse_mixer, swapped

KINDS = ("attention", "window", "linear", "power", "mla")
"""Families of mixers that --only and --exclude name; "mix" is the sixth word."""

ASKED = tuple(kind for kind in MIXERS if kind not in (*KINDS, "dsa"))
"""Kinds that are candidates where --only names them: their projections, and so the weights, are others.

DSA is left out: its indexer needs MLA's latents.
"""

DEGREES = range(1, 7)
WINDOWS = tuple(2**exponent for exponent in range(9, 41))
"""Windows that a layer mix may take, in tokens: whole blocks for any kernel."""


def family(mixer: Mixer) -> str:
    """Return the word of KINDS for a mixer, or its kind where it is none of them."""
    if type(mixer) is Attention:
        return "attention" if mixer.window is None else "window"
    return mixer.kind


@dataclass(frozen=True)
class Scope:
    """Layers that take part: their positions (from 0), their mixers, and whether the model has others besides.

    marked: a plan's label says that others stay, since other plans change them.
    """

    positions: tuple[int, ...]
    mixers: tuple[Mixer, ...]
    partial: bool
    marked: bool = False

    @property
    def classes(self) -> tuple[Mixer, ...]:
        """The distinct mixers, in order of first use."""
        return tuple(dict.fromkeys(self.mixers))


def scopes(spec: ModelSpec) -> list[Scope]:
    """Return all layers with a mixer; and, in a hybrid, those alone whose state grows with the context.

    A scope with a mixer that cannot be swapped is left out.
    """
    slots: list[tuple[int, Mixer]] = []
    for use in spec.layer_uses():
        if use.layer.mixer is not None:
            slots.extend((position, use.layer.mixer) for span in use.positions for position in span)
    slots.sort(key=lambda slot: slot[0])
    growing = [slot for slot in slots if grows(slot[1])]
    found: list[Scope] = []
    for part, partial in ((slots, False), (growing, True)):
        if part and all(swappable(mixer) for _, mixer in part) and not (partial and len(part) == len(slots)):
            positions, mixers = zip(*part, strict=True)
            found.append(Scope(positions, mixers, partial, marked=bool(found)))
    return found


@dataclass(frozen=True)
class Choice:
    """One mixer that layers of a scope may take: a `--mixer` text (AS_IS: stay), and what it makes of each class.

    reshaped: its heads have other dims at the same weights. fewer: its query heads share fewer key/value heads.
    """

    text: str
    mixers: tuple[Mixer, ...]
    family: str
    reshaped: bool = False
    fewer: bool = False

    @property
    def degree(self) -> int | None:
        mixer = self.mixers[0]
        return mixer.p if isinstance(mixer, Power) else None

    @property
    def runs(self) -> bool:
        """Whether powerplan.kernels has it, as far as it is power attention."""
        return all(runs_here(mixer) for mixer in self.mixers)

    @property
    def odd(self) -> bool:
        return self.family == "power" and self.degree is not None and self.degree % 2 == 1


def choice(spec: ModelSpec, text: str, classes: Iterable[Mixer], **marks: bool) -> Choice:
    """Return the choice that a `--mixer` text means in layers of these classes, which have heads.

    As `--mixer` has it: what is one kind is one kind in all layers, gates and all.
    """
    kind, settings = parse_mixer(text)
    known = first_of(spec, kind)
    mixers = tuple(swapped(mixer, kind, settings, spec.hidden_size, known)[0] for mixer in classes)
    return Choice(text, mixers, family(mixers[0]), **marks)


def asked_choices(spec: ModelSpec, scope: Scope, kinds: Iterable[str]) -> list[Choice]:
    """Return a choice for each kind of ASKED among `kinds`, as `--mixer` has it; like the layers of it in the model."""
    made = []
    for kind in ASKED:
        if kind in kinds:
            made.append(choice(spec, kind, scope.classes))
    return _distinct(made)


def staying(classes: tuple[Mixer, ...]) -> Choice:
    """Return the choice to leave layers as they are."""
    return Choice(AS_IS, classes, family(classes[0]) if classes else "")


def shape_of(spec: ModelSpec, scope: Scope) -> Shape | None:
    """Return the heads that all layers of a scope have, or would have in place of MLA's; None where they differ."""
    return common_shape(list(scope.classes), spec.hidden_size) if scope.classes else None


def uniform_choices(spec: ModelSpec, scope: Scope, windows: Iterable[int]) -> list[Choice]:
    """Return the choices for all layers of a scope at once: every kind, every degree, every shape of the heads."""
    classes, named = scope.classes, default_shape(spec)
    made = [choice(spec, mixer_text("attention", *_named(named)), classes)]
    made += [choice(spec, window_text(window, named), classes) for window in windows]
    made.append(choice(spec, mixer_text("linear", *_named(named)), classes))
    made += [choice(spec, power_text(p, named), classes) for p in DEGREES]
    made += [choice(spec, power_text(p, named, normalize=False), classes) for p in DEGREES if p % 2]
    own = shape_of(spec, scope)
    if own is not None:
        others = same_weights(own)
        for shape in (own, *others):
            made += [choice(spec, _power(p, shape), classes, reshaped=True) for p in DEGREES if shape != own]
            for shared in fewer_kv_heads(shape):
                made += [choice(spec, _power(p, shared), classes, reshaped=shape != own, fewer=True) for p in DEGREES]
    return _distinct(made)


def mix_choices(spec: ModelSpec, scope: Scope, context: int) -> list[Choice]:
    """Return the choices that are mixed: kinds with a kernel, heads of the same weights, windows under `context`."""
    classes, named = scope.classes, default_shape(spec)
    made = []
    if len(classes) == 1 and family(classes[0]) not in ("attention", "window", "linear", "power"):
        made.append(staying(classes))
    if named is None:
        made.append(choice(spec, mixer_text("attention"), classes))
    made += [choice(spec, window_text(window, named), classes) for window in WINDOWS if window < context]
    made.append(choice(spec, mixer_text("linear", *_named(named)), classes))
    degrees = [p for p in KERNEL_DEGREES if p > 1]
    made += [choice(spec, power_text(p, named, normalize=p % 2 == 0), classes) for p in degrees]
    own = shape_of(spec, scope)
    if own is not None:
        made += [choice(spec, _power(p, shape), classes, reshaped=True) for shape in same_weights(own) for p in degrees]
    return _distinct(made)


def softmax_in_place(spec: ModelSpec, classes: tuple[Mixer, ...]) -> tuple[Mixer, ...]:
    """Return what each class would be if it kept every key: itself, or softmax attention of its heads."""
    full = choice(spec, mixer_text("attention", *_named(default_shape(spec))), classes).mixers
    return tuple(mixer if is_softmax(mixer) else other for mixer, other in zip(classes, full, strict=True))


def _named(shape: Shape | None) -> list[str]:
    return [shape.setting()] if shape else []


def _power(p: int, shape: Shape) -> str:
    return power_text(p, shape, normalize=p % 2 == 0)


def _distinct(made: list[Choice]) -> list[Choice]:
    """Return the choices without those that make the same of every layer as an earlier one."""
    first: dict[tuple[Mixer, ...], Choice] = {}
    for item in made:
        first.setdefault(item.mixers, item)
    return list(first.values())
