"""Reads a model from what a user writes: a YAML file, a config.json or its folder, or a name of the catalogue."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from powerplan.documents import Document, parse_json, parse_yaml
from powerplan.errors import InputError, did_you_mean, one_line, parameter, shown
from powerplan.lookalikes import folder_hint, refuse_by_keys, refuse_by_name
from powerplan.spec import ModelSpec
from powerplan.textfiles import YAML_SUFFIXES, is_json, read_text
from powerplan.validation import validate


@dataclass(frozen=True)
class LoadedModel:
    """A spec, the file or catalogue entry that it was read from, and remarks that the user should see."""

    spec: ModelSpec
    origin: str
    notes: tuple[str, ...] = ()


def load_model(model: str | Path) -> LoadedModel:
    """Read a model.

    Args:
        model: the path of a powerplan YAML, of a config.json or of the folder that holds it; or a catalogue name or
            alias. A file that exists is preferred to a name.

    Raises:
        InputError: the model is not known, cannot be read, or is wrong in itself.
    """
    text = str(model)
    if not text.strip():
        raise InputError("is empty; give a file, a folder with a config.json, or a catalogue name", parameter("model"))
    path = Path(text)
    name = find_name(text)
    mode = _mode(path)
    if stat.S_ISDIR(mode) and _mode(path / "config.json"):
        return load_file(path / "config.json")
    if stat.S_ISDIR(mode) and name is None:
        raise InputError(f"is a folder without a config.json that can be read{folder_hint(path)}", str(path))
    if mode and not stat.S_ISDIR(mode):
        loaded = load_file(path)
        if name is None:
            return loaded
        note = f"read the file {text}; there is also a catalogue model of this name"
        return LoadedModel(loaded.spec, loaded.origin, (note, *loaded.notes))
    if name is not None:
        return LoadedModel(catalogue_spec(name), f"catalogue: {name}")
    if path.suffix.lower() in (*YAML_SUFFIXES, ".json"):
        return load_file(path)  # Raises the error that says why it cannot be read.
    if path.is_absolute() or text.startswith(("./", "../", "~")):
        raise InputError("no such file or folder", text)
    hint = did_you_mean(text, known_names(), count=3, cutoff=0.4)
    raise InputError(f"{shown(text)} is neither a file nor a catalogue model{hint} (powerplan models lists them)")


def _mode(path: Path) -> int:
    """Return the mode of the file or folder at `path`, or 0 if there is none, or none that can be looked at."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def load_file(path: Path) -> LoadedModel:
    """Read a file: a Hugging Face config if its suffix is .json or it begins like an object, else a powerplan YAML."""
    refuse_by_name(path)
    document_text = read_text(path)
    if is_json(path, document_text):
        document = parse_json(document_text, str(path))
        refuse_by_keys(document)
        return _from_huggingface(document, path)
    return LoadedModel(validate(parse_yaml(document_text, str(path))), str(path))


def _from_huggingface(document: Document, path: Path) -> LoadedModel:
    from powerplan.huggingface import read_config

    parent = path.resolve().parent.name
    fallback = parent if path.name == "config.json" and parent else path.stem
    spec, notes = read_config(document, fallback_name=one_line(fallback))
    return LoadedModel(spec, str(path), notes)


@cache
def catalogue_names() -> tuple[str, ...]:
    """Return the names of the built-in models, sorted."""
    names = (entry.name for entry in (files("powerplan.models") / "catalogue").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def catalogue_text(name: str) -> str:
    """Return the YAML of a built-in model."""
    return (files("powerplan.models") / "catalogue" / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def catalogue_spec(name: str) -> ModelSpec:
    """Return the spec of a built-in model by its exact catalogue name."""
    return validate(parse_yaml(catalogue_text(name), f"{name}.yaml"))


@cache
def aliases() -> dict[str, str]:
    """Return the catalogue name of every alias; aliases are in lower case."""
    return {alias.lower(): name for name in catalogue_names() for alias in catalogue_spec(name).aliases}


def known_names() -> list[str]:
    """Return all names of built-in models: catalogue names, then aliases."""
    return [*catalogue_names(), *aliases()]


def find_name(text: str) -> str | None:
    """Return the catalogue name that `text` means, or None. Case and a leading "organisation/" do not matter."""
    name = text.strip().lower()
    # ../gpt2-small is a path, and not a name in an organisation.
    in_organisation = re.fullmatch(r"[a-z0-9][\w.-]*/([^/]+)", name)
    for candidate in (name, in_organisation[1]) if in_organisation else (name,):
        if candidate in catalogue_names():
            return candidate
        if candidate in aliases():  # Last, as it reads the whole catalogue.
            return aliases()[candidate]
    return None
