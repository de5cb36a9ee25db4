"""Writes a ModelSpec as YAML for people to edit: without defaults, each mixer and FFN on one line; and its name."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import yaml

from powerplan.documents import plain_scalar
from powerplan.errors import InputError, shown
from powerplan.ffn import MLP, MoE
from powerplan.mixers.block import Block
from powerplan.part import Part
from powerplan.quantization import Rule
from powerplan.rope import Rope
from powerplan.spec import MAX_NAME, Layer, ModelSpec


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


MAX_SHORT_NAME = 80
"""The longest name that `short_name` makes, in characters."""


def check_name(name: str, where: str) -> str:
    """Return the name of a model that is to be written; raises InputError for one that is no plain word."""
    wrong = re.search(r"[^\w.-]", name)
    if not name or wrong or not re.match(r"\w", name):
        found = f"{shown(name)} holds {shown(wrong.group())}" if wrong else f"{shown(name)} is not a name"
        allowed = "a name has letters, digits and . _ -, and begins with a letter or digit"
        raise InputError(f"{found}; {allowed}", where)
    if len(name) > MAX_NAME:
        raise InputError(f"{shown(name)} has {len(name)} characters; allowed are up to {MAX_NAME}", where)
    return name


def short_name(name: str, change: str = "") -> str:
    """Return a name that can be typed, from that of a model and what was changed: "gpt2-small-power-p2".

    Examples:
        >>> short_name("gpt2-small", "9 power p=2 6x128 + 3 window 4,096")
        'gpt2-small-9-power-p2-6x128-3-window-4096'
    """
    text = f"{name} {change}".replace(" with ", " ").replace(" at ", " ")
    text = re.sub(r"(?<=\d) x (?=\d)", "x", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    text = re.sub(r"[^\w.-]+", "-", re.sub(r"=(?=\d)", "", text))
    return re.sub(r"-{2,}", "-", text)[:MAX_SHORT_NAME].strip("-.") or name


def spec_to_yaml(spec: ModelSpec, name: str | None = None) -> str:
    """Return YAML that is read as an equal spec, or as one of another `name`."""
    data: dict[str, Any] = {"name": name or spec.name, "aliases": list(spec.aliases)}
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
