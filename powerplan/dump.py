"""Writes a ModelSpec as YAML for people to edit: without defaults, each mixer and FFN on one line."""

from __future__ import annotations

from typing import Any

import msgspec
import yaml

from powerplan.documents import plain_scalar
from powerplan.ffn import MLP, MoE
from powerplan.mixers.base import Block, Part
from powerplan.quantization import Rule
from powerplan.rope import Rope
from powerplan.spec import Layer, ModelSpec


class _Line(dict[str, Any]):
    """A mapping that is written on one line, in braces."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote a text that our parser would read as a number or a flag; PyYAML quotes by the rules of YAML 1.1."""
    try:
        plain = plain_scalar(text) == text
    except ValueError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else "'")


_Dumper.add_representer(str, _text)
_Dumper.add_representer(
    _Line, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=True)
)


def spec_to_yaml(spec: ModelSpec) -> str:
    """Return YAML that is read as an equal spec."""
    data: dict[str, Any] = {"name": spec.name, "aliases": list(spec.aliases)}
    data |= {key: getattr(spec, key) for key in ("published", "source", "note")}
    data = {key: value for key, value in data.items() if value}
    data |= {key: getattr(spec, key) for key in ("vocab_size", "hidden_size", "tie_embeddings")}
    if spec.position_embeddings is not None:
        data["position_embeddings"] = spec.position_embeddings
    if spec.rope is not None:
        data["rope"] = [_rope(rope) for rope in spec.rope] if isinstance(spec.rope, tuple) else _rope(spec.rope)
    if spec.trained_context is not None:
        data["trained_context"] = spec.trained_context
    data["norm"] = _line(spec.norm, always=("kind", "per_layer"))
    if spec.extras:
        data["extras"] = [_line(extra, always=()) for extra in spec.extras]
    if spec.quantization is not None:
        rules = [_rule(rule) for rule in spec.quantization.rules]
        data["quantization"] = {"method": spec.quantization.method, "rules": rules}
    data["layers"] = [
        {"repeat": group.repeat}
        | ({"pattern": [_layer(layer) for layer in group.pattern]} if group.pattern else _layer(group.period[0]))
        for group in spec.layers
    ]
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=200, allow_unicode=True)


def _layer(layer: Layer) -> dict[str, Any]:
    data: dict[str, Any] = {}
    data |= {key: _block(block) for key, block in (("mixer", layer.mixer), ("ffn", layer.ffn)) if block is not None}
    data |= {"extras": [_line(extra, always=()) for extra in layer.extras]} if layer.extras else {}
    data |= {"norms": layer.norms} if layer.norms is not None else {}
    data |= {"tied": True} if layer.tied else {}
    return data


def _block(block: Block) -> _Line:
    line = _line(block, always=("gated",) if isinstance(block, MLP | MoE) else ())
    for name, same in block.same_as.items():
        if getattr(block, name) == getattr(block, same):
            line.pop(name, None)
    first = {"kind": block.kind} | ({"p": line["p"]} if "p" in line else {})
    return _Line(first | line)


def _rule(rule: Rule) -> _Line:
    return _plain(_line(rule, always=()))


def _rope(rope: Rope) -> _Line:
    line = _line(rope, always=("theta",))
    if rope.scaling is not None:
        line["scaling"] = _Line({"kind": rope.scaling.kind} | _plain(_line(rope.scaling, always=())))
    return _plain(line)


def _plain(line: _Line) -> _Line:
    """Return a line with lists in place of tuples, and whole numbers without a point."""
    return _Line((name, _plain_value(value)) for name, value in line.items())


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_value(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() and value < 1e15 else value


def _line(part: Part, always: tuple[str, ...]) -> _Line:
    values = ((field, getattr(part, field.name)) for field in msgspec.structs.fields(part))
    return _Line((field.name, value) for field, value in values if field.name in always or value != field.default)
