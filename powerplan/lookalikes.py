"""Files that come with a model and are not its config.json: what each is, and which file to give instead."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from powerplan.documents import Document
from powerplan.errors import InputError, shown


class _Kind(NamedTuple):
    """What a file is, which one to give, and the keys that tell its content."""

    what: str
    give: str
    keys: frozenset[str] = frozenset()


_BESIDE = "give the config.json beside it, or the folder that holds both"
_ORIGINAL = _Kind(
    "the params.json of an original checkpoint (Llama), which leaves sizes to its code",
    "give the config.json of the same model as transformers has it",
    frozenset({"dim", "n_layers", "n_heads"}),
)
_ADAPTER = _Kind(
    "the adapter_config.json of a PEFT adapter, which has no sizes",
    "give the config.json of its base model",
    frozenset({"peft_type"}),
)
_INDEX = _Kind("the index of a checkpoint's weights", _BESIDE, frozenset({"weight_map"}))
_TOKENIZER = _Kind("a tokenizer's file", _BESIDE)
_QUANTIZATION = _Kind(
    "the quantization of a checkpoint, without sizes", _BESIDE, frozenset({"producer", "quantization"})
)
_GENERATION = _Kind("settings of text generation", _BESIDE)

_BY_NAME = {
    "params.json": _ORIGINAL,
    "adapter_config.json": _ADAPTER,
    "model.safetensors.index.json": _INDEX,
    "pytorch_model.bin.index.json": _INDEX,
    "generation_config.json": _GENERATION,
    "tokenizer_config.json": _TOKENIZER,
    "tokenizer.json": _TOKENIZER,
    "special_tokens_map.json": _TOKENIZER,
    "preprocessor_config.json": _Kind("settings of an image or audio processor", _BESIDE),
    "hf_quant_config.json": _QUANTIZATION,
}
_WEIGHTS = _Kind("a file of weights", _BESIDE)
_ELSEWHERE = "give the config.json of the same checkpoint, which has the sizes"
_SIZELESS = (_INDEX, _WEIGHTS)
"""What says nothing of sizes, where there is no config.json beside it."""

_BY_SUFFIX = {
    ".gguf": _Kind("a GGUF checkpoint", "give the config.json of the model that it was converted from"),
    **dict.fromkeys((".safetensors", ".bin", ".pt", ".pth"), _WEIGHTS),
}
_BY_KEYS = (
    _ADAPTER,
    _INDEX,
    _ORIGINAL,
    _QUANTIZATION,
    _Kind(_GENERATION.what, _BESIDE, frozenset({"bos_token_id", "eos_token_id", "transformers_version"})),
    _Kind(_TOKENIZER.what, _BESIDE, frozenset({"tokenizer_class"})),
)


def refuse_by_name(path: Path) -> None:
    """Raise InputError for a file whose name says that it is no model spec and no config.json."""
    kind = _BY_NAME.get(path.name.lower()) or _BY_SUFFIX.get(path.suffix.lower())
    if kind is not None and kind is not _ORIGINAL:  # A config.json may be called params.json: its keys tell.
        raise _error(kind, str(path))


def refuse_by_keys(document: Document) -> None:
    """Raise InputError for JSON without a model_type whose keys are those of another file, whatever its name is."""
    data = document.data
    if not isinstance(data, dict) or "model_type" in data:
        return
    sizes = {"hidden_size", "n_embd", "d_model", "text_config", "layers"} & data.keys()
    kind = next((kind for kind in _BY_KEYS if kind.keys <= data.keys()), None)
    if kind is None or sizes or (kind is _ORIGINAL and "hidden_dim" in data):  # Mistral's has all sizes.
        return
    base = data.get("base_model_name_or_path")
    if kind is _ADAPTER and isinstance(base, str) and base:
        kind = kind._replace(give=f"{kind.give}, {shown(base)}")
    raise _error(kind, document.name)


def folder_hint(folder: Path) -> str:
    """Return the end of a message about a folder without a config.json: what else it has, and which file to give."""
    try:
        found = {path.name: path for path in sorted(folder.iterdir())}
    except OSError:
        return ""
    kinds = {name: _BY_NAME.get(name.lower()) or _BY_SUFFIX.get(Path(name).suffix.lower()) for name in found}
    for wanted in ((_ADAPTER, _BY_SUFFIX[".gguf"]), (_INDEX,), (_WEIGHTS,)):
        for name, kind in kinds.items():
            if kind is not None and kind in wanted:
                return f"; it has {name}, {kind.what}: {_ELSEWHERE if kind in _SIZELESS else kind.give}"
    inner = [name for name, path in found.items() if _is_file(path / "config.json")]
    if inner:
        return f"; {inner[0]} in it has one"
    cached = [name for name in found if name.startswith("models--")]
    return f"; it has the folders of {len(cached)} cached models: give one of these" if cached else ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _error(kind: _Kind, where: str) -> InputError:
    return InputError(f"is {kind.what}; {kind.give}", where)
