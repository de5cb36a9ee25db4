"""ModelSpec: what powerplan knows of a model, that is layers of mixers and FFNs, embeddings and norms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from powerplan.errors import InputError, hostile_characters, shown
from powerplan.ffn import AnyFFN
from powerplan.mixers import SIZED, AnyMixer, Mixer
from powerplan.mixers.base import Block, Part, Size, problem
from powerplan.mixers.formulas import Term, term
from powerplan.quantization import Quantization
from powerplan.units import parse_context

MAX_LAYERS = 100_000
"""The most layers that a model may have."""

MAX_NAME = 200
"""The longest name of a model, in characters."""


class Norm(Part, frozen=True, kw_only=True):
    """Norms of the residual stream.

    kind: an rmsnorm has m weights, a layernorm m weights and m biases (none with `bias: false`), none no parameters.
    per_layer: how many norms one layer has. final: one before the LM head. embedding: one after the embedding.
    """

    kind: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    per_layer: Annotated[int, msgspec.Meta(ge=0, le=16)] = 2
    final: bool = True
    embedding: bool = False
    bias: bool = True

    @property
    def vectors(self) -> int:
        """The parameters of one norm, in multiples of the hidden size."""
        return {"none": 0, "rmsnorm": 1, "layernorm": 1 + int(self.bias)}[self.kind]


class Layer(Part, frozen=True, kw_only=True):
    """One residual layer: a mixer, an FFN, or both."""

    mixer: AnyMixer | None = None
    ffn: AnyFFN | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The mixer and the FFN, or the one of them that the layer has."""
        return tuple(block for block in (self.mixer, self.ffn) if block is not None)

    def check(self) -> None:
        if not self.blocks:
            raise problem("mixer", "a layer needs a mixer, an ffn or both, and has neither")

    def describe(self) -> str:
        return " + ".join(block.describe() for block in self.blocks)


class LayerGroup(Part, frozen=True, kw_only=True):
    """A layer (`mixer`, `ffn`) that is repeated, or a `pattern` of layers that is repeated as a whole."""

    repeat: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)] = 1
    mixer: AnyMixer | None = None
    ffn: AnyFFN | None = None
    pattern: Annotated[tuple[Layer, ...], msgspec.Meta(min_length=1)] | None = None

    def check(self) -> None:
        has_layer = self.mixer is not None or self.ffn is not None
        if self.pattern is not None and has_layer:
            raise problem("pattern", "a group has either a pattern or its own mixer and ffn, and this one has both")
        if self.pattern is None and not has_layer:
            raise problem("mixer", "a group needs a mixer, an ffn or a pattern, and has none of them")

    @property
    def period(self) -> tuple[Layer, ...]:
        """The layers of one repetition."""
        return self.pattern if self.pattern is not None else (Layer(mixer=self.mixer, ffn=self.ffn),)


@dataclass(frozen=True)
class LayerUse:
    """A layer of a model and all positions (from 0) at which the model has it."""

    layer: Layer
    positions: tuple[range, ...]

    @property
    def count(self) -> int:
        return sum(len(span) for span in self.positions)


class ModelSpec(Part, frozen=True, kw_only=True):
    """A decoder-only language model.

    position_embeddings: the length of a learned position table; left out for RoPE, NoPE or ALiBi.
    quantization: how weights are stored that are not in the dtype of the rest; it changes bytes, and no FLOPs.
    aliases, published, source, note: describe an entry of the catalogue; they change no number.
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
    norm: Norm = Norm()
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

    @property
    def layer_count(self) -> int:
        return sum(group.repeat * len(group.period) for group in self.layers)

    def layer_uses(self) -> list[LayerUse]:
        """Return the distinct layers in order of first use, each with all its positions."""
        uses: dict[Layer, list[range]] = {}
        start = 0
        for group in self.layers:
            period = group.period
            stop = start + group.repeat * len(period)
            for offset, layer in enumerate(period):
                uses.setdefault(layer, []).append(range(start + offset, stop, len(period)))
            start = stop
        return [LayerUse(layer, tuple(spans)) for layer, spans in uses.items()]

    def mixer_counts(self) -> list[tuple[Mixer, int]]:
        """Return the mixer of every kind of layer that has one, and in how many layers it stands."""
        return [(use.layer.mixer, use.count) for use in self.layer_uses() if use.layer.mixer is not None]

    def mixers(self) -> list[Mixer]:
        """Return the distinct mixers in order of first use."""
        return list(dict.fromkeys(mixer for mixer, _ in self.mixer_counts()))

    def mixers_by_position(self) -> list[tuple[int, Mixer]]:
        """Return the layers that have a mixer, as position (from 0) and mixer, in the order of the model."""
        layers = [layer for group in self.layers for layer in group.period * group.repeat]
        return [(position, layer.mixer) for position, layer in enumerate(layers) if layer.mixer is not None]

    def embedding_terms(self) -> tuple[Term, ...]:
        """Return the parameters of the input embedding, which is a look-up without FLOPs."""
        return self._terms("embedding", "V*m")

    def position_terms(self) -> tuple[Term, ...]:
        """Return the parameters of the learned position table, if there is one."""
        return self._terms("position table", "T*m" if self.position_embeddings else "")

    def head_terms(self) -> tuple[Term, ...]:
        """Return the matmul parameters of the LM head; a tied embedding takes FLOPs as the LM head all the same."""
        return self._terms("lm head", "V*m")

    def norm_terms(self) -> tuple[Term, ...]:
        """Return the parameters of the norms of one layer."""
        return self._norms("norms", self.norm.per_layer)

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
            return layer if layer.mixer is None else Layer(mixer=change(layer.mixer), ffn=layer.ffn)

        return self.map_layers(changed)

    def map_layers(self, change: Callable[[Layer], Layer]) -> ModelSpec:
        """Return the spec with `change(layer)` in place of every layer; groups stay."""
        groups = []
        for group in self.layers:
            period = tuple(map(change, group.period))
            if group.pattern is None:
                groups.append(LayerGroup(repeat=group.repeat, mixer=period[0].mixer, ffn=period[0].ffn))
            else:
                groups.append(LayerGroup(repeat=group.repeat, pattern=period))
        return msgspec.structs.replace(self, layers=tuple(groups))


def with_defaults(data: Any) -> Any:
    """Return the data of a spec with its shorthand written out: sizes such as "4k" and head dims that are left out.

    A missing head_dim becomes hidden_size / heads if that is whole and the kind needs one (SIZED). What is wrong in the
    data stays as it is, for the validation to report.
    """
    if not isinstance(data, dict) or not isinstance(data.get("layers"), (list, tuple)):
        return data
    return data | {"layers": [_written_out(group, data.get("hidden_size")) for group in data["layers"]]}


def _written_out(group: Any, hidden: Any) -> Any:
    if not isinstance(group, dict):
        return group
    if isinstance(group.get("pattern"), (list, tuple)):
        group = group | {"pattern": [_written_out(layer, hidden) for layer in group["pattern"]]}
    mixer = group.get("mixer")
    if not isinstance(mixer, dict):
        return group
    mixer = dict(mixer)
    for key in LENGTHS:
        if isinstance(mixer.get(key), str):
            with suppress(InputError):
                mixer[key] = parse_context(mixer[key])
    heads, kind = mixer.get("heads"), mixer.get("kind")
    lacks_head_dim = isinstance(kind, str) and kind in SIZED and "head_dim" not in mixer
    are_counts = all(type(count) is int and count > 0 for count in (heads, hidden))
    if lacks_head_dim and are_counts and hidden % heads == 0:
        mixer["head_dim"] = hidden // heads
    return group | {"mixer": mixer}


LENGTHS = ("window", "chunk_size", "block_size", "compress_size", "compress_stride", "select_size")
"""Fields of mixers that are lengths in tokens, which a spec may write as sizes such as "4k"."""


def group_layers(layers: list[Layer], longest_period: int = 16) -> tuple[LayerGroup, ...]:
    """Return `layers` as groups of equal layers and of repeated patterns of up to `longest_period` layers.

    Greedy from the front: each group takes the pattern that covers the most layers, and the shortest of those.
    """
    groups = []
    start = 0
    while start < len(layers):
        periods = range(1, min(longest_period, (len(layers) - start) // 2 + 1) + 1)
        repeats = {period: _repeats(layers, start, period) for period in periods}
        period = max(periods, key=lambda size: size * repeats[size] if repeats[size] > 1 else size == 1)
        repeat, pattern = repeats[period], tuple(layers[start : start + period])
        if period == 1:
            groups.append(LayerGroup(repeat=repeat, mixer=pattern[0].mixer, ffn=pattern[0].ffn))
        else:
            groups.append(LayerGroup(repeat=repeat, pattern=pattern))
        start += period * repeat
    return tuple(groups)


def _repeats(layers: list[Layer], start: int, period: int) -> int:
    stop = start + period
    while stop < len(layers) and layers[stop] == layers[stop - period]:
        stop += 1
    return (stop - start) // period
