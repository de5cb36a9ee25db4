"""ModelSpec: what powerplan knows of a model, that is layers of mixers and FFNs, embeddings and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import msgspec

from powerplan.errors import InputError, hostile_characters, shown
from powerplan.extras import Extra
from powerplan.ffn import AnyFFN, MoE, Stem
from powerplan.mixers import AnyMixer, Mixer
from powerplan.mixers.block import Block
from powerplan.mixers.formulas import Term, term
from powerplan.part import Part, Size, Window, problem
from powerplan.quantization import Quantization
from powerplan.rope import AnyScaling, Rope

MAX_LAYERS = 100_000
"""The most layers that a model may have."""

MAX_NAME = 200
"""The longest name of a model, in characters."""


Norms = Annotated[int, msgspec.Meta(ge=0, le=16)]
"""How many norms a layer has."""


class Norm(Part, frozen=True, kw_only=True):
    """Norms of the residual stream.

    kind: an rmsnorm has m weights, a layernorm m weights and m biases (none with `bias: false`), none no parameters.
    per_layer: how many norms one layer has.
    final: one before the LM head.
    embedding: one after the embedding.
    bias: whether a layernorm has biases.
    """

    kind: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    per_layer: Norms = 2
    final: bool = True
    embedding: bool = False
    bias: bool = True

    @property
    def vectors(self) -> int:
        """The parameters of one norm, in multiples of the hidden size."""
        return {"none": 0, "rmsnorm": 1, "layernorm": 1 + int(self.bias)}[self.kind]


class Layer(Part, frozen=True, kw_only=True):
    """One residual layer: a mixer, an FFN, or both.

    mixer: the part that has a state, such as attention.
    ffn: the MLP or mixture of experts.
    extras: further parameters of the layer, by name.
    norms: how many norms it has, where that is not the model's norm.per_layer.
    tied: its weights are those of an earlier layer: they are stored once, and take FLOPs each time.
    """

    mixer: AnyMixer | None = None
    ffn: AnyFFN | None = None
    extras: tuple[Extra, ...] = ()
    norms: Norms | None = None
    tied: bool = False

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The mixer and the FFN, or the one of them that the layer has, and its extras."""
        return tuple(block for block in (self.mixer, self.ffn, *self.extras) if block is not None)

    def check(self) -> None:
        if self.mixer is None and self.ffn is None:
            raise problem("mixer", "a layer needs a mixer, an ffn or both, and has neither")
        if any(extra.lookup for extra in self.extras):
            raise problem("extras", "a lookup belongs to the extras of the model, and not to a layer")

    def describe(self) -> str:
        name = " + ".join(block.describe() for block in (self.mixer, self.ffn) if block is not None)
        return f"{name}, tied" if self.tied else name


class LayerGroup(Part, frozen=True, kw_only=True, dict=True):
    """A layer, with the fields of `Layer`, that is repeated, or a `pattern` of layers that is repeated as a whole.

    repeat: how many times the layer or the pattern stands in the model.
    pattern: layers that are repeated as a whole, in place of a mixer and an ffn of the group's own.
    """

    repeat: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)] = 1
    mixer: AnyMixer | None = None
    ffn: AnyFFN | None = None
    extras: tuple[Extra, ...] = ()
    norms: Norms | None = None
    tied: bool = False
    pattern: Annotated[tuple[Layer, ...], msgspec.Meta(min_length=1)] | None = None

    def check(self) -> None:
        has_layer = self.mixer is not None or self.ffn is not None
        if self.pattern is not None and has_layer:
            raise problem("pattern", "a group has either a pattern or its own mixer and ffn, and this one has both")
        if self.pattern is not None and (self.extras or self.norms is not None or self.tied):
            raise problem("pattern", "extras, norms and tied belong to the layers of the pattern, and not to the group")
        if self.pattern is None and not has_layer:
            raise problem("mixer", "a group needs a mixer, an ffn or a pattern, and has none of them")

    @cached_property
    def period(self) -> tuple[Layer, ...]:
        """The layers of one repetition."""
        if self.pattern is not None:
            return self.pattern
        return (Layer(mixer=self.mixer, ffn=self.ffn, extras=self.extras, norms=self.norms, tied=self.tied),)

    @classmethod
    def of(cls, period: Sequence[Layer], repeat: int = 1) -> LayerGroup:
        """Return the group of `repeat` times the layers of `period`."""
        if len(period) > 1:
            return cls(repeat=repeat, pattern=tuple(period))
        (layer,) = period
        return cls(repeat=repeat, **{field: getattr(layer, field) for field in Layer.__struct_fields__})


@dataclass(frozen=True)
class LayerUse:
    """A layer of a model and all positions (from 0) at which the model has it."""

    layer: Layer
    positions: tuple[range, ...]

    @property
    def count(self) -> int:
        return sum(len(span) for span in self.positions)


class ModelSpec(Part, frozen=True, kw_only=True, dict=True):
    """A decoder-only language model.

    name: what reports call the model.
    vocab_size: tokens of the vocabulary.
    hidden_size: features of the residual stream.
    tie_embeddings: the LM head is the embedding: stored once, and FLOPs as the LM head all the same.
    norm: the norms of the residual stream.
    layers: groups of layers, from the first to the last.
    position_embeddings: tokens of a learned position table; left out for RoPE, NoPE or ALiBi.
    rope: how queries and keys are rotated, one setting or a list of them: in each layer the first holds that covers it,
    and one that none covers is not rotated; left out where it is not known. It changes no number.
    trained_context: the longest context that the model was trained for, in tokens; it changes no number.
    extras: further parameters of the whole model, by name, such as a bias of the LM head.
    quantization: how weights are stored that are not in the dtype of the rest; it changes bytes, and no FLOPs.
    aliases: other names of an entry of the catalogue; they change no number.
    published: what is published of its size; it changes no number.
    source: where the numbers of an entry come from; it changes no number.
    note: a remark on an entry; it changes no number.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
    aliases: tuple[str, ...] = ()
    published: str | None = None
    source: str | None = None
    note: str | None = None
    vocab_size: Size
    hidden_size: Size
    tie_embeddings: bool = False
    position_embeddings: Size | None = None
    rope: Rope | tuple[Rope, ...] | None = None
    trained_context: Window | None = None
    norm: Norm = Norm()
    extras: tuple[Extra, ...] = ()
    quantization: Quantization | None = None
    layers: Annotated[tuple[LayerGroup, ...], msgspec.Meta(min_length=1)]

    def check(self) -> None:
        if not self.name.strip():
            raise problem("name", "is blank")
        texts = {"name": (self.name,), "aliases": self.aliases}
        notes = {field: (getattr(self, field) or "",) for field in ("published", "source", "note")}
        for field, values in (texts | notes).items():
            for character in hostile_characters("".join(values)):
                if field in texts or character not in "\n\t":
                    raise problem(field, f"holds a control character, {shown(character)}")
        if self.layer_count > MAX_LAYERS:
            raise problem("layers", f"{self.layer_count:,} layers in all; allowed are up to {MAX_LAYERS:,}")
        for use in self._layer_uses:
            ffn = use.layer.ffn
            if isinstance(ffn, Stem) and ffn.vocab_size < self.vocab_size:
                rows = f"a table of {ffn.vocab_size:,} rows has none for some of {self.vocab_size:,} tokens"
                raise problem("layers", f"{rows}; leave vocab_size of stem out")
        for rope in self.rope_settings:
            if rope.in_layers and rope.in_layers[-1] >= self.layer_count:
                last = self.layer_count - 1
                raise problem("rope", f"in_layers has {rope.in_layers[-1]:,}, and the last layer is {last:,}")

    @property
    def rope_settings(self) -> tuple[Rope, ...]:
        """The settings of `rope`, be it one or a list of them; none where it is not known."""
        if self.rope is None:
            return ()
        return self.rope if isinstance(self.rope, tuple) else (self.rope,)

    def rope_at(self, position: int) -> Rope | None:
        """Return how the layer at `position`, from 0, rotates; None where it does not.

        Where that is not known, layers of a model without learned positions have the base 10,000.
        """
        if self.rope is None:
            return Rope() if self.position_embeddings is None else None
        return next((rope for rope in self.rope_settings if rope.in_layers is None or position in rope.in_layers), None)

    def rope_of(self, layer: Layer) -> Rope | None:
        """Return how a layer rotates at its first position; one that the model lacks, as the last layer does."""
        first = next((use.positions[0].start for use in self._layer_uses if use.layer == layer), self.layer_count - 1)
        return self.rope_at(first)

    @property
    def rope_scalings(self) -> tuple[AnyScaling, ...]:
        """How the RoPE of its layers is scaled."""
        return tuple(rope.scaling for rope in self.rope_settings if rope.scaling is not None)

    @property
    def reached_context(self) -> int | None:
        """The longest context that training and the scaling of RoPE are for, in tokens; None where it is not known."""
        if self.trained_context is None:
            return None
        trained = self.trained_context
        return max([trained, *(int(scaling.reach(trained)) for scaling in self.rope_scalings)])

    @property
    def layer_count(self) -> int:
        return sum(group.repeat * (len(group.pattern) if group.pattern else 1) for group in self.layers)

    def layer_uses(self) -> list[LayerUse]:
        """Return the distinct layers in order of first use, each with all its positions."""
        return list(self._layer_uses)

    @cached_property
    def _layer_uses(self) -> tuple[LayerUse, ...]:
        uses: dict[Layer, list[range]] = {}
        start = 0
        for group in self.layers:
            period = group.period
            stop = start + group.repeat * len(period)
            for offset, layer in enumerate(period):
                uses.setdefault(layer, []).append(range(start + offset, stop, len(period)))
            start = stop
        return tuple(LayerUse(layer, tuple(spans)) for layer, spans in uses.items())

    def mixer_counts(self) -> list[tuple[Mixer, int]]:
        """Return the distinct mixers in order of first use, and in how many layers each stands."""
        return list(self._mixer_counts.items())

    @cached_property
    def _mixer_counts(self) -> dict[Mixer, int]:
        counts: dict[Mixer, int] = {}
        for use in self._layer_uses:
            if use.layer.mixer is not None:
                counts[use.layer.mixer] = counts.get(use.layer.mixer, 0) + use.count
        return counts

    def mixers(self) -> list[Mixer]:
        """Return the distinct mixers in order of first use."""
        return list(self._mixer_counts)

    def mixers_by_layer(self) -> dict[int, Mixer]:
        """Return the mixer of every layer that has one, by its position from 0, in order."""
        places = {
            position: use.layer.mixer
            for use in self._layer_uses
            if use.layer.mixer is not None
            for span in use.positions
            for position in span
        }
        return dict(sorted(places.items()))

    def mixtures(self) -> list[MoE]:
        """Return the distinct mixtures of experts in order of first use."""
        ffns = [use.layer.ffn for use in self._layer_uses]
        return list(dict.fromkeys(ffn for ffn in ffns if isinstance(ffn, MoE)))

    def embedding_terms(self) -> tuple[Term, ...]:
        """Return the parameters of the input embedding, which is a look-up without FLOPs."""
        return self._terms("embedding", "V*m")

    def position_terms(self) -> tuple[Term, ...]:
        """Return the parameters of the learned position table, if there is one."""
        return self._terms("position table", "T*m" if self.position_embeddings else "")

    def head_terms(self) -> tuple[Term, ...]:
        """Return the matmul parameters of the LM head; a tied embedding takes FLOPs as the LM head all the same."""
        return self._terms("lm head", "V*m")

    def norm_terms(self, layer: Layer) -> tuple[Term, ...]:
        """Return the parameters of the norms of a layer."""
        return self._norms("norms", self.norms_of(layer))

    def norms_of(self, layer: Layer) -> int:
        """Return how many norms a layer has."""
        return self.norm.per_layer if layer.norms is None else layer.norms

    def final_norm_terms(self) -> tuple[Term, ...]:
        """Return the parameters of the norm before the LM head."""
        return self._norms("final norm", int(self.norm.final))

    def embedding_norm_terms(self) -> tuple[Term, ...]:
        """Return the parameters of the norm after the embedding, which RWKV has."""
        return self._norms("embedding norm", int(self.norm.embedding))

    def _norms(self, component: str, count: int) -> tuple[Term, ...]:
        vectors = count * self.norm.vectors
        return self._terms(component, f"{vectors}*m" if vectors else "")

    def _terms(self, component: str, formula: str) -> tuple[Term, ...]:
        symbols = {"V": self.vocab_size, "T": self.position_embeddings or 0, "m": self.hidden_size}
        return (term(component, formula, symbols),) if formula else ()

    def map_mixers(self, change: Callable[[Mixer], AnyMixer]) -> ModelSpec:
        """Return the spec with `change(mixer)` in place of every mixer; groups and FFNs stay."""

        def changed(layer: Layer) -> Layer:
            return layer if layer.mixer is None else msgspec.structs.replace(layer, mixer=change(layer.mixer))

        return self.map_layers(changed)

    def map_layers(self, change: Callable[[Layer], Layer]) -> ModelSpec:
        """Return the spec with `change(layer)` in place of every layer; groups stay."""
        groups = tuple(LayerGroup.of([change(layer) for layer in group.period], group.repeat) for group in self.layers)
        return msgspec.structs.replace(self, layers=groups)


LENGTHS = (
    *("window", "chunk_size", "block_size", "compress_size", "compress_stride", "select_size"),
    *("document_size", "question_size", "pool_size", "filter_length", "trained_context", "original_context"),
)
"""Fields that are lengths in tokens, which a spec may write as sizes such as "4k"."""


LONGEST_PATTERN = 16
"""The most layers of a pattern that is found in a list of layers."""


def group_layers(layers: list[Layer]) -> tuple[LayerGroup, ...]:
    """Return `layers` as groups of equal layers and of repeated patterns of up to LONGEST_PATTERN layers.

    Greedy from the front: each group takes the pattern that covers the most layers, and the shortest of those.
    """
    numbers: dict[Layer, int] = {}
    by_identity: dict[int, int] = {}  # Most layers of a deep model are the same objects: that costs no comparison.
    kinds = []
    for layer in layers:
        number = by_identity.get(id(layer))
        if number is None:
            number = by_identity[id(layer)] = numbers.setdefault(layer, len(numbers))
        kinds.append(number)
    groups = []
    start = 0
    while start < len(layers):
        periods = range(1, min(LONGEST_PATTERN, (len(layers) - start) // 2 + 1) + 1)
        repeats = {period: _repeats(kinds, start, period) for period in periods}
        period = max(periods, key=lambda size: size * repeats[size] if repeats[size] > 1 else size == 1)
        groups.append(LayerGroup.of(layers[start : start + period], repeats[period]))
        start += period * repeats[period]
    return tuple(groups)


def _repeats(kinds: list[int], start: int, period: int) -> int:
    stop = start + period
    while stop < len(kinds) and kinds[stop] == kinds[stop - period]:
        stop += 1
    return (stop - start) // period


def check_spec(spec: object) -> None:
    """Raise InputError unless this is a ModelSpec; a name or what load_model returned is none."""
    if not isinstance(spec, ModelSpec):
        problem = "must be a ModelSpec, such as load_model('gpt2-small').spec, and is"
        raise InputError(f"{problem} {type(spec).__name__}", "spec")
