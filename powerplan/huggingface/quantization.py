"""Read quantization_config: in which format each part of a model is stored, scales included.

Parts are those of powerplan.quantization. Routers are wide in every method: transformers keeps them as parameters that
no quantizer replaces, and lists of modules name them besides.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from powerplan.errors import one_line, parameter, shown
from powerplan.ffn import MLP, MoE
from powerplan.huggingface.config import Config
from powerplan.huggingface.methods import METHODS, Format, Reading
from powerplan.huggingface.modules import ModuleNames, NotUnderstoodError
from powerplan.mixers import Mixer
from powerplan.quantization import Quantization, Rule
from powerplan.spec import Layer, ModelSpec


def with_quantization(spec: ModelSpec, config: Config) -> ModelSpec:
    """Return the spec with the quantization that a config.json or its text_config states; notes go to `config`.

    Bytes follow the dtype where the method is not understood, and a note says so. InputError, with its place, where a
    value has another type or is out of range.
    """
    stated: list[Config] = []
    for prefix in dict.fromkeys(((), config.prefix)):
        around = Config(config.document, prefix)  # Without the defaults and other names of the family's keys.
        around.notes = config.notes
        found = around.nested("quantization_config")
        stated += [found] if found else []
    if not stated:
        return spec
    if stated[-1].data != stated[0].data:
        config.note("text_config has another quantization_config than the file around it, which counts")
    settings = stated[0]
    method = settings.data.get("quant_method")
    if method is None and (settings.data.get("load_in_4bit") or settings.data.get("load_in_8bit")):
        method = "bitsandbytes"
    try:
        read = METHODS.get(method) if isinstance(method, str) else None
        if read is None:
            raise NotUnderstoodError("it has no quant_method" if method is None else f"quant_method {shown(method)}")
        quantization = _placed(spec, read(settings), settings)
    except NotUnderstoodError as problem:
        text = f"quantization_config is not understood ({problem}): bytes follow {parameter('dtype')}"
        config.note(one_line(text))
        return spec
    except msgspec.ValidationError as error:
        raise settings.error(f"quantization_config: {error}") from None
    return spec if quantization is None else msgspec.structs.replace(spec, quantization=quantization)


def _placed(spec: ModelSpec, reading: Reading, settings: Config) -> Quantization | None:
    """Return the rules of a reading for the layers that a spec has; None, and a note, where they cover nothing."""
    wide = ModuleNames(reading.wide)
    within = None if reading.within is None else ModuleNames(reading.within)
    others: dict[Format | None, list[str]] = {}
    for name, form in reading.others.items():
        others.setdefault(form, []).append(name)
    named = [(form, ModuleNames(names)) for form, names in others.items()]
    formats: dict[str, dict[int, Format | None]] = {}
    mixed: set[str] = set()

    def form_of(part: str, layer: int, mixer: Mixer | None) -> Format | None:
        usual = reading.experts if part == "experts" and reading.experts else reading.linear
        if not (wide.text or named or within):
            return usual
        counts: Counter[Format | None] = Counter()
        left, matrices = 0, 0
        for form, names in named:
            found, matrices = names.share(part, layer, mixer)
            counts[form] += found
        found, matrices = wide.share(part, layer, mixer)
        counts[None] += found
        left = max(0, matrices - counts.total())
        if within is not None:
            found, matrices = within.share(part, layer, mixer)
            counts[None] += max(0, matrices - found)
            left = min(left, found)
        counts[usual] += left
        if len(+counts) > 1:
            mixed.add(part.replace("_", " "))
        return counts.most_common(1)[0][0]

    layers = [layer for group in spec.layers for _ in range(group.repeat) for layer in group.period]
    for place, layer in enumerate(layers):
        for part in _parts(layer):
            formats.setdefault(part, {})[place] = form_of(part, place, layer.mixer if part == "mixers" else None)
    rules = _rules(formats)
    tables = [("embedding", "model.embed_tokens", False)]
    if not spec.tie_embeddings:
        tables.append(("lm_head", "lm_head", reading.lm_head and not wide.has("lm_head")))
    for table, module, linear in tables:
        own = [form for form, names in named if names.has(module)]
        form = own[0] if own else reading.linear if linear else None
        if form is not None:
            rules.setdefault((form, None), []).append(table)
    if mixed:
        parts = ", ".join(sorted(mixed))
        settings.note(f"matrices of {parts} have several formats in the file: a part of a layer counts in that of most")
    if not rules:
        settings.note(f"quantization_config ({reading.label}) covers no matrix that is counted")
        return None
    made = [{"parts": parts, "in_layers": places, **dict(form)} for (form, places), parts in rules.items()]
    return Quantization(method=reading.label, rules=tuple(msgspec.convert(made, list[Rule])))


def _parts(layer: Layer) -> list[str]:
    parts = ["mixers"] if layer.mixer is not None else []
    if isinstance(layer.ffn, MLP):
        parts.append("mlp")
    if isinstance(layer.ffn, MoE):
        shared = layer.ffn.shared_intermediate_size or layer.ffn.latent_size
        parts += ["experts", *(["shared_experts"] if shared else [])]
    return parts


def _rules(formats: dict[str, dict[int, Format | None]]) -> dict[tuple[Format, tuple[int, ...] | None], list[str]]:
    """Return which parts have a format, and in which layers: None where all layers with that part have it."""
    rules: dict[tuple[Format, tuple[int, ...] | None], list[str]] = {}
    for part, by_layer in formats.items():
        for form in dict.fromkeys(by_layer.values()):
            if form is not None:
                places = tuple(place for place, own in by_layer.items() if own == form)
                rules.setdefault((form, None if len(places) == len(by_layer) else places), []).append(part)
    return rules
