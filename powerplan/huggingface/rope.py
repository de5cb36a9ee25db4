"""RoPE of a config.json, and the longest context that its model was trained for. Neither changes any count.

Files say it in three ways: rope_theta and rope_scaling side by side; rope_parameters, one object or one for each kind
of layer, as transformers 5 writes them; and keys of a family's own. A wrong value is refused, with its place. A scaling
that is not known gets a remark, and the spec has no RoPE then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from powerplan.documents import Step
from powerplan.errors import InputError, shown
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.defaults import tables
from powerplan.huggingface.rope_styles import COMPRESS, FULL, LABELS, MAIN, OWN_KEYS, SLIDING, STYLES, Style
from powerplan.mixers import MLA, Compressed, Linear, Mixer, Power, RetNet
from powerplan.rope import MAX_NUMBER, SCALINGS, Rope
from powerplan.spec import Layer, ModelSpec
from powerplan.units import MAX_CONTEXT


def with_rope(spec: ModelSpec, config: Config, family: Family) -> ModelSpec:
    """Return the spec with the RoPE and the trained context of its file. InputError for a wrong value, with its place.

    A model with learned positions gets neither: its table says how far it goes.
    """
    if spec.position_embeddings is not None:
        return spec
    style, known = STYLES.get(config.family, Style()), _known(config, family)
    trained = _trained_context(config, style, known)
    layers = {
        position: use.layer
        for use in spec.layer_uses()
        if use.layer.mixer is not None and _may_rotate(use.layer.mixer)
        for span in use.positions
        for position in span
    }
    if not layers:
        return replace(spec, trained_context=trained)
    try:
        reader = _Reader(config, style, known, trained)
        by_layer = {position: reader.rope(position, layers[position]) for position in sorted(layers)}
    except _NotKnownError as problem:
        config.note(f"RoPE is left out: {problem}")
        return replace(spec, trained_context=trained)
    return replace(spec, rope=_settings(by_layer), trained_context=trained)


class _NotKnownError(Exception):
    """A setting that is not wrong, but not understood."""


def _known(config: Config, family: Family) -> Mapping[str, Any]:
    """Return the positions of transformers' config class."""
    known = tables().families.get(family.like or config.family)
    return known.positions if known else {}


def _may_rotate(mixer: Mixer) -> bool:
    """Whether a mixer meets its keys by their positions: a cache of keys, or a state of one of these kinds."""
    return bool(mixer.entry) or isinstance(mixer, (Power, Linear, RetNet))


def _trained_context(config: Config, style: Style, known: Mapping[str, Any]) -> int | None:
    for name in style.contexts:
        if config.has(name):
            value = config.data[name]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if type(value) is not int:
                raise config.error(f"{name} must be a length in tokens, and is {shown(value)}", name)
            return value if 0 < value <= MAX_CONTEXT else None  # Some files write -1 or 10^30 for no limit.
    value = known.get("max_position_embeddings")
    return value if type(value) is int and value > 0 else None


def _settings(by_layer: Mapping[int, Rope | None]) -> Rope | tuple[Rope, ...]:
    """Return the RoPE of a spec, given that of each layer that may have one: the fewest positions are listed."""
    positions: dict[Rope, list[int]] = {}
    for position, rope in by_layer.items():
        if rope is not None:
            positions.setdefault(rope, []).append(position)
    everywhere = None not in by_layer.values()
    if everywhere and len(positions) == 1:
        return next(iter(positions))
    rising = sorted(positions, key=lambda rope: len(positions[rope]))
    rest = rising.pop() if everywhere else None
    listed = [replace(rope, in_layers=tuple(positions[rope])) for rope in rising]
    return (*listed, rest) if rest is not None else tuple(listed)


class _Values:
    """An object of the file at a path, or default values, with checks of what it has under its keys."""

    def __init__(self, config: Config, values: Mapping[str, Any], path: tuple[Step, ...]) -> None:
        self.config, self.values, self.path = config, values, path

    def error(self, problem: str, key: str) -> InputError:
        return self.config.error(f"{'.'.join(map(str, (*self.path, key)))} {problem}", *self.path, key)

    def number(self, key: str, low: float = 0, *, above: bool = True) -> float | None:
        """Return a number above `low`, or from it on if not `above`; None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not right or not (low < value if above else low <= value) or not value <= MAX_NUMBER:
            bound = f"above {low:g}" if above else f"of at least {low:g}"
            raise self.error(f"must be a number {bound}, and is {shown(value)}", key)
        return float(value)

    def length(self, key: str) -> int | None:
        value = self.number(key)
        if value is not None and not (value.is_integer() and 2 <= value <= MAX_CONTEXT):
            raise self.error(f"must be a length in tokens, and is {shown(self.values[key])}", key)
        return None if value is None else int(value)

    def numbers(self, key: str) -> tuple[float, ...] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(one) in (int, float) and 0 < one <= MAX_NUMBER for one in value):
            raise self.error(f"must be a list of numbers above 0, and is {shown(value)}", key)
        return tuple(float(one) for one in value)

    def needed(self, key: str, value: Any) -> Any:
        if value is None:
            raise _NotKnownError(f"{'.'.join(map(str, (*self.path, 'rope_type')))} needs {key}, and there is none")
        return value


class _Reader:
    """The RoPE of a file, for each kind of layer."""

    def __init__(self, config: Config, style: Style, known: Mapping[str, Any], trained: int | None) -> None:
        self.config, self.style, self.trained = config, style, trained
        for key in OWN_KEYS:
            config.has(key)
        self.default: Mapping[str, Any] = known.get("rope_parameters") or {}
        self.longest = trained or known.get("max_position_embeddings")
        self.stated, self.path = self._stated()
        nested = LABELS & set(self.stated or {})
        self.nested = bool(nested)
        self.labels = {*style.bases} if not nested or len(style.bases) > 1 else nested

    def _stated(self) -> tuple[Mapping[str, Any] | None, tuple[Step, ...]]:
        for key in ("rope_scaling", "rope_parameters"):
            value = self.config.data.get(key)
            if value and not isinstance(value, dict):
                raise self.config.error(f"{key} must be an object, and is {shown(value)}", key)
            if value:
                return value, (key,)
        return None, ()

    def rope(self, position: int, layer: Layer) -> Rope | None:
        """Return the RoPE of the layer at `position`, which has a mixer."""
        if self.style.rotates is not None and not self.style.rotates(self.config, position, layer):
            return None
        mixer = layer.mixer
        assert mixer is not None
        label = self._label(mixer)
        values, default = self._of_label(label)
        if values is None:
            return None
        top = _Values(self.config, self.config.data, ())
        theta = self._base(values, default, label, position, mixer)
        if theta is None:
            return None
        partial = values.number("partial_rotary_factor") if values.path else None
        stated = top.number("partial_rotary_factor") or top.number("rotary_pct")
        if not values.path or not LABELS & set(self.default):  # A kind of layer that is stated has no share by default.
            stated = stated or default.get("partial_rotary_factor")
        if isinstance(self.config.data.get("partial_rotary_factors"), list):
            stated = self._of_layer("partial_rotary_factors", position, 0)
        partial = partial or stated or self._rotary_dim(mixer) or self.style.partial
        if partial > 1:
            raise top.error(f"must be a share up to 1, and is {partial:g}", "partial_rotary_factor")
        scaled = self.config.data.get("yarn_only_types")  # Step: the kinds of layers that are scaled.
        kind = FULL if mixer.window_size is None else SLIDING
        if isinstance(scaled, list) and scaled and kind not in scaled:
            scaling = None
        else:
            theta, scaling = self._scaling(values, theta, mixer)
        return Rope(theta=theta, partial=1 if isinstance(mixer, MLA) else partial, scaling=scaling)

    def _label(self, mixer: Mixer) -> str:
        if MAIN in self.labels:
            plain = isinstance(mixer, Compressed) and mixer.compress_rate is None
            return MAIN if plain else COMPRESS
        if self.labels == {""}:
            return ""
        chunked = mixer.kind == "chunked_attention" and "chunked_attention" in self.labels
        return "chunked_attention" if chunked else FULL if mixer.window_size is None else SLIDING

    def _of_label(self, label: str) -> tuple[_Values | None, Mapping[str, Any]]:
        """Return what the file has for a kind of layer, else the default, and the default; None for no RoPE."""
        default = self.default.get(label, {} if LABELS & set(self.default) else self.default)
        if self.stated is None:
            return _Values(self.config, default, ()), default
        if not self.nested:
            values = self.stated if label in self.style.flat else default
            return _Values(self.config, values, self.path if label in self.style.flat else ()), default
        own = self.stated.get(label)
        if own is None and label not in self.default:
            return None, default
        if own is not None and not isinstance(own, dict):
            key = self.path[0]
            raise self.config.error(f"{key}.{label} must be an object, and is {shown(own)}", key, label)
        return _Values(self.config, own or default, (*self.path, label) if own else ()), default

    def _base(
        self, values: _Values, default: Mapping[str, Any], label: str, position: int, mixer: Mixer
    ) -> float | None:
        """Return the base of a layer; None where the file says that it has none."""
        stated = self.config.data.get("rope_theta")
        key = "rope_theta" if isinstance(stated, list) else "layer_rope_theta"
        by_layer = self.config.data.get(key)
        if by_layer is not None:
            return self._of_layer(key, position, 1)
        if values.path and values.values.get("rope_theta", 0) is None and "rope_theta" not in self.config.data:
            return None
        key = self.style.bases.get(label, "rope_theta")
        top = _Values(self.config, self.config.data, ())
        stated = values.number("rope_theta", 1) if values.path else None
        stated = stated or (top.number(key, 1) if key else None) or self._own_base(position)
        return (stated or default.get("rope_theta") or self.style.base) * (top.number("rope_ratio") or 1)

    def _of_layer(self, key: str, position: int, low: float) -> float | None:
        """Return the entry of a list for the layer at `position`, a number above `low`; None where it is 0 or null."""
        entries = self.config.data[key]
        if not isinstance(entries, list) or len(entries) <= position:
            raise self.config.error(f"{key} must be a list with a number for each layer", key)
        return _Values(self.config, {key: entries[position] or None}, ()).number(key, low)

    def _own_base(self, position: int) -> float | None:
        """Return the base that objects of a family's own hold: attn_config (DBRX), rotary (InternLM), attn (fla)."""
        for key, name in (("attn_config", "rope_theta"), ("rotary", "base")):
            own = self.config.data.get(key)
            if isinstance(own, dict) and (base := _Values(self.config, own, (key,)).number(name, 1)):
                return base
        attn = self.config.data.get("attn")
        for index, own in enumerate(attn if isinstance(attn, list) else [attn]):
            layers = own.get("layers") if isinstance(own, dict) else None
            if isinstance(layers, list) and position in layers:
                path = ("attn", index) if isinstance(attn, list) else ("attn",)
                return _Values(self.config, own, path).number("rope_theta", 1)
        return None

    def _rotary_dim(self, mixer: Mixer) -> float | None:
        """Return the share of a head that rotary_dim features are; None where neither file nor family has it."""
        dim, heads = self.config.value("rotary_dim"), mixer.own_heads()
        if dim is None or heads is None:
            return None
        if type(dim) is not int or not 1 <= dim <= MAX_NUMBER:
            raise self.config.error(f"rotary_dim must be a number of features, and is {shown(dim)}", "rotary_dim")
        share = min(1.0, dim / heads.head_dim)
        return share if int(heads.head_dim * share) == min(dim, heads.head_dim) else math.nextafter(share, 1)

    def _scaling(self, values: _Values, theta: float, mixer: Mixer) -> tuple[float, Any]:
        """Return the base and the scaling of an object."""
        key = "rope_type" if values.values.get("rope_type") is not None else "type"
        word = values.values.get(key)
        if word in (None, "default", "mrope"):
            if values.values.get("factor") not in (None, 1, 1.0) and word is None:
                raise _NotKnownError(f"{values.path[0] if values.path else 'RoPE'} has a factor and no rope_type")
            return theta, None
        kind = "longrope" if word == "su" or (word == "yarn" and "phi" in self.config.family) else word
        kind = "yarn" if kind == "deepseek_yarn" else kind
        if not isinstance(kind, str):
            raise values.error(f"must be a word, and is {shown(word)}", key)
        if kind not in SCALINGS:
            kinds = ", ".join(sorted(SCALINGS))
            raise _NotKnownError(f"{key} {shown(word)} is not known; known are default, {kinds}")
        alpha = values.number("alpha")
        if kind == "dynamic" and alpha:
            heads = mixer.own_heads()
            dim = heads.head_dim if heads is not None else 0
            return (theta * alpha ** (dim / (dim - 2)) if dim > 2 else theta), None
        fields = self._fields(kind, values)
        try:
            return theta, SCALINGS[kind](**{name: value for name, value in fields.items() if value is not None})
        except InputError as error:
            raise self.config.error(f"{'.'.join(map(str, values.path))}.{error.problem}", *values.path) from None

    def _fields(self, kind: str, values: _Values) -> dict[str, Any]:
        """Return the fields of a scaling, None for those that the file leaves out."""
        names = SCALINGS[kind].__struct_fields__
        fields: dict[str, Any] = {}
        top = _Values(self.config, self.config.data, ())
        original = values.length("original_max_position_embeddings")
        outer = top.length("original_max_position_embeddings")
        original = outer or original or self.longest
        if "original_context" in names:
            if kind == "dynamic":
                original = self.longest
            fields["original_context"] = values.needed("original_max_position_embeddings", original)
        factor = values.number("factor", 1, above=False)
        if factor is None and kind in ("yarn", "longrope") and self.longest and original:
            factor = max(1.0, self.longest / original)
        fields["factor"] = factor if kind == "proportional" else values.needed("factor", factor)
        for name in names:
            if name in ("short_factor", "long_factor"):
                fields[name] = values.needed(name, values.numbers(name))
            elif name == "truncate":
                fields[name] = values.values.get(name) if isinstance(values.values.get(name), bool) else None
            elif name not in fields:
                # Files write 0 for a scale that is not there.
                fields[name] = values.number(name) if values.values.get(name) else None
        if kind == "yarn" and fields["attention_factor"] is None:
            fields["attention_factor"] = self.style.attention_factor
        return fields
