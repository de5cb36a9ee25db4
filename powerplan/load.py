"""Reads a model from what a user writes: a YAML file, a config.json or its folder, or a name of the catalogue."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from powerplan.documents import Document, parse_json, parse_yaml
from powerplan.errors import InputError, did_you_mean, one_line, parameter, shown
from powerplan.lookalikes import folder_hint, refuse_by_keys, refuse_by_name
from powerplan.spec import ModelSpec
from powerplan.textfiles import YAML_SUFFIXES, is_json, read_text
from powerplan.validation import validate


@runtime_checkable
class ConfigObject(Protocol):
    """A config of the transformers package, or what writes itself as one."""

    def to_json_string(self) -> str:
        """Return the text of its config.json."""


@dataclass(frozen=True)
class LoadedModel:
    """A spec, the file or catalogue entry that it was read from, and remarks that the user should see.

    like: the family that a config.json was read as, where the user named one.
    """

    spec: ModelSpec
    origin: str
    notes: tuple[str, ...] = ()
    like: str | None = None


def load_model(model: str | Path | Mapping[str, Any] | ConfigObject, like: str | None = None) -> LoadedModel:
    """Read a model.

    Args:
        model: the path of a powerplan YAML, of a config.json or of the folder that holds it; or a catalogue name or
            alias. A file that exists is preferred to a name. Or what such a file holds, as a dict; or a config of the
            transformers package, as `model.config`.
        like: for a config.json, the family to read it as, by its model_type, such as "llama"; its own where left out.

    Raises:
        InputError: the model is not known, cannot be read, or is wrong in itself.
    """
    if isinstance(model, (Mapping, ConfigObject)):
        return _load_data(model, like)
    if not isinstance(model, (str, Path)):
        problem = "must be a catalogue name, a path, a spec or a config, and is"
        raise InputError(f"{problem} {shown(model)}", parameter("model"))
    text = str(model)
    if not text.strip():
        raise InputError("is empty; give a file, a folder with a config.json, or a catalogue name", parameter("model"))
    path, name = Path(text), find_name(text)
    file = model_file(text)
    if file is not None:
        loaded = load_file(file, like)
        if name is None or file != path:
            return loaded
        note = f"read the file {text}; there is also a built-in model of this name"
        return LoadedModel(loaded.spec, loaded.origin, (note, *loaded.notes), loaded.like)
    if stat.S_ISDIR(_mode(path)) and name is None:
        raise InputError(f"is a folder without a config.json that can be read{folder_hint(path)}", str(path))
    if name is not None and like is not None:
        raise InputError(f"is for a config.json, and {name} is a built-in model", parameter("like"))
    if name is not None:
        return LoadedModel(catalogue_spec(name), f"catalogue: {name}")
    if path.suffix.lower() in (*YAML_SUFFIXES, ".json"):
        return load_file(path)  # Raises the error that says why it cannot be read.
    if path.is_absolute() or text.startswith(("./", "../", "~")):
        raise InputError("no such file or folder", text)
    hint = did_you_mean(text, known_names(), count=3, cutoff=0.4)
    raise InputError(f"{shown(text)} is neither a file nor a built-in model{hint} (powerplan models lists them)")


def model_file(model: str | Path) -> Path | None:
    """Return the file that `load_model` reads for MODEL, or None where there is none.

    That is MODEL itself, or in a folder its config.json, else its params.json; in a folder of the Hugging Face cache,
    models--organisation--name, those of the snapshot that refs/main names, or of the only one.
    """
    path = Path(model)
    mode = _mode(path)
    if not stat.S_ISDIR(mode):
        return path if mode else None
    folder = path if _mode(path / "config.json") else _snapshot(path) or path
    return next((folder / name for name in ("config.json", "params.json") if _mode(folder / name)), None)


def _snapshot(folder: Path) -> Path | None:
    """Return the snapshot that a folder of the Hugging Face cache stands for; None where that is not clear."""
    try:
        snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
        named = (folder / "refs" / "main").read_text(encoding="utf-8").strip() if len(snapshots) > 1 else ""
    except (OSError, ValueError):
        return None
    chosen = [path for path in snapshots if path.name == named] or snapshots
    return chosen[0] if len(chosen) == 1 else None


def is_config(model: str | Path) -> bool:
    """Whether `load_model` reads a config.json for MODEL. InputError for a file that is no text, or another file."""
    file = model_file(model)
    if file is None:
        return False
    refuse_by_name(file)
    return is_json(file, read_text(file))


def _mode(path: Path) -> int:
    """Return the mode of the file or folder at `path`, or 0 if there is none, or none that can be looked at."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def load_file(path: Path, like: str | None = None) -> LoadedModel:
    """Read a file: a Hugging Face config if its suffix is .json or it begins like an object, else a powerplan YAML."""
    refuse_by_name(path)
    return load_text(read_text(path), path, like)


def load_text(text: str, path: Path, like: str | None = None) -> LoadedModel:
    """Read a model from the text of the file at `path`, as `load_file` does."""
    if is_json(path, text):
        document = parse_json(text, str(path))
        refuse_by_keys(document)
        return _from_huggingface(document, path, like)
    if like is not None:
        raise InputError(f"is for a config.json, and {path} is a powerplan YAML", parameter("like"))
    return LoadedModel(validate(parse_yaml(text, str(path))), str(path))


def _load_data(model: Mapping[str, Any] | ConfigObject, like: str | None) -> LoadedModel:
    """Return the model of a config, or of what a config.json or a powerplan YAML holds."""
    where = parameter("model")
    try:
        text = json.dumps(dict(model)) if isinstance(model, Mapping) else model.to_json_string()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"holds what JSON cannot: {error}", where) from None
    document = Document(where, parse_json(text, where).data, None)
    data = document.data if isinstance(document.data, dict) else {}
    if "layers" in data and "model_type" not in data:  # A spec of powerplan.
        if like is not None:
            raise InputError("is for a config.json, and the model is a powerplan spec", parameter("like"))
        return LoadedModel(validate(document), where)
    refuse_by_keys(document)
    from powerplan.huggingface import read_config  # As below.

    family = like or data.get("model_type") or "model"
    spec, notes = read_config(document, one_line(str(family)), like)
    return LoadedModel(spec, "config.json", notes, like)


def _from_huggingface(document: Document, path: Path, like: str | None) -> LoadedModel:
    from powerplan.huggingface import read_config  # Names of the catalogue need none of it.

    fallback = _folder_name(path) if path.name in ("config.json", "params.json") else path.stem.strip("<>")  # <stdin>
    fallback = fallback or path.stem
    spec, notes = read_config(document, one_line(fallback), like)
    if like is not None:
        from powerplan.huggingface.meta import meta_note  # torch is imported where transformers builds the model.

        notes = (*notes, *meta_note(document, spec))
    return LoadedModel(spec, str(path), notes, like)


def _folder_name(path: Path) -> str:
    """Return the name of the folder that a file is in; of a snapshot in the Hugging Face cache that of its model."""
    parent = path.parent.resolve()  # The file itself is a link in a snapshot, to a folder of blobs.
    model = parent.parent.parent.name
    cached = parent.parent.name == "snapshots" and model.startswith("models--")
    return model.rpartition("--")[2] if cached else parent.name


@cache
def catalogue_names() -> tuple[str, ...]:
    """Return the names of the built-in models, sorted."""
    return tuple(sorted(entry.stem for entry in _catalogue().glob("*.yaml")))


def _catalogue() -> Path:
    """Return the folder of the built-in models. importlib.resources would take 4 ms more of a cold start."""
    found = find_spec("powerplan.models")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "catalogue"


def catalogue_text(name: str) -> str:
    """Return the YAML of a built-in model."""
    return (_catalogue() / f"{name}.yaml").read_text(encoding="utf-8")


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
