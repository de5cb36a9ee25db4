"""Write powerplan/huggingface/defaults.json: the defaults of transformers' config classes, as far as they matter.

    python scripts/transformers_defaults.py

A config.json may leave out what its class has a default for. The file has for each model_type of `families`:
`defaults`, the values of the class's fields before its __post_init__ derives any; `aliases`, other names of keys. Keys
that change no count (inert.py) are left out, but for `positions`: the RoPE and the longest context of a config that
says nothing of them. For each of `wrappers`, which hold a text decoder beside other towers:
`text`, the model_type of its text_config where the file names none, `tied`, its tie_word_embeddings, and `either`,
where that of the text_config ties too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from pathlib import Path
from types import NoneType
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import (  # type: ignore[attr-defined]
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from powerplan.huggingface.inert import INERT

TARGET = Path(__file__).parent.parent / "powerplan" / "huggingface" / "defaults.json"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    families: dict[str, dict[str, Any]] = {}
    wrappers: dict[str, dict[str, Any]] = {}
    for model_type in sorted(CONFIG_MAPPING_NAMES):
        config_class = CONFIG_MAPPING[model_type]
        if "text_config" in (config_class.sub_configs or {}):
            text = text_type_of(config_class)
            if text in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or text in TEXT_TYPES:
                tied = getattr(config_class, "tie_word_embeddings", None)
                either = {"either": True} if ties_either(config_class) else {}
                wrappers[model_type] = {"text": text, "tied": tied, **either}
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type in TEXT_TYPES:
            aliases = {alias: key for alias, key in config_class.attribute_map.items() if alias not in INERT}
            families[model_type] = {"defaults": defaults_of(config_class), "aliases": aliases}
            if positions := positions_of(config_class):
                families[model_type]["positions"] = positions
    for wrapper in wrappers.keys() & families.keys():
        del families[wrapper]
    data = {"transformers": transformers.__version__, "families": families, "wrappers": wrappers}
    TARGET.write_text(json.dumps(data, indent=0, sort_keys=True) + "\n", encoding="utf-8")


TEXT_TYPES = (
    *("chameleon", "cosmos3_edge_text", "deepseek_ocr2_text", "ernie4_5_vl_moe_text", "glm4v_moe_text", "glm4v_text"),
    *("glm_ocr_text", "granite4_vision_text", "granite_docling_text", "hunyuan_vl_text", "hy_v4_vl_text", "mistral4"),
    *("mllama_text_model", "molmo2_text", "muse_glimmer_text", "muse_spark_text", "paddleocr_vl_text"),
    *("qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text"),
    *("qwen3_vl_text", "step3p5", "voxtral_realtime_text"),
)
"""Text decoders that exist in wrappers alone, and have no causal language model of their own."""


def ties_either(config_class: Any) -> bool:
    """Return whether the class ties embeddings where its text_config says so, and the file around it says no."""
    try:
        text = config_class().get_text_config().to_dict() | {"tie_word_embeddings": True}
        return bool(config_class(text_config=text, tie_word_embeddings=False).tie_word_embeddings)
    except Exception:  # Some classes cannot be built without arguments.
        return False


def text_type_of(config_class: Any) -> str | None:
    """Return the model_type of the text_config that the class makes by default, or None where it makes none."""
    try:
        return str(config_class().get_text_config().model_type)
    except Exception:  # Some classes cannot be built without arguments.
        return None


def defaults_of(config_class: Any) -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(config_class) if field.name not in INERT}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    known = (bool, int, float, str, list, dict, NoneType)
    return {name: value for name, value in values.items() if isinstance(value, known)}


def positions_of(config_class: Any) -> dict[str, Any]:
    """Return rope_parameters and max_position_embeddings of a config of defaults, where there are such."""
    try:
        config = config_class()
    except Exception:  # Some classes cannot be built without arguments.
        return {}
    keys = ("rope_parameters", "max_position_embeddings")
    return {key: value for key in keys if (value := getattr(config, key, None))}


if __name__ == "__main__":
    main()
