"""Files of models with other towers: where their text decoder is, and whether its embeddings are tied."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hf_decoders import Settings, require

from powerplan.accounting import Accounting
from powerplan.documents import parse_json
from powerplan.errors import InputError
from powerplan.huggingface import read_config
from powerplan.huggingface.defaults import tables
from powerplan.huggingface.families import FAMILIES, wrapped_families
from powerplan.huggingface.flat import FLAT, MINICPM_VERSIONS
from powerplan.load import LoadedModel

Read = Callable[[Settings], LoadedModel]

QWEN: Settings = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEAD = QWEN["vocab_size"] * QWEN["hidden_size"]


def counted(loaded: LoadedModel) -> int:
    return Accounting(loaded.spec).total_parameters.with_embeddings


def alone(model_type: str) -> str:
    return f"{model_type}: the text decoder alone is counted, other towers and projectors are not"


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("internvl_chat", ("llm_config",)),
        ("h2ovl_chat", ("llm_config",)),
        ("multi_modality", ("language_config",)),
        ("deepseek_vl_v2", ("language_config",)),
        ("ovis", ("llm_config",)),
        ("llava", ("text_config",)),
        ("qwen2_5_omni", ("thinker_config", "text_config")),
        ("vibevoice", ("text_config",)),
        ("vibevoice", ("decoder_config",)),
    ],
)
def test_where_the_text_decoder_is(read: Read, model_type: str, path: tuple[str, ...]) -> None:
    """Keys around the decoder's config count for nothing, but for tie_word_embeddings in some."""
    inner: Any = QWEN
    for step in reversed(path):
        inner = {step: inner}
    loaded = read({"model_type": model_type, "hidden_size": 7, "vision_config": {"hidden_size": 5}} | inner)
    assert loaded.spec.layers == read(QWEN).spec.layers
    assert counted(loaded) == counted(read(QWEN))
    assert loaded.notes == (alone(model_type),)


def test_deepseek_ocr_as_published(read: Read) -> None:
    """Its language_config names no model_type, and the file says its keys again beside it."""
    language = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "first_k_dense_replace": 1,
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "kv_lora_rank": None,
        "lm_head": True,
        "moe_intermediate_size": 896,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 10,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 12,
        "num_key_value_heads": 10,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "rm_head": False,
        "topk_method": "greedy",
        "use_mla": False,
        "v_head_dim": 0,
        "vocab_size": 129_280,
    }
    loaded = read({"model_type": "deepseek_vl_v2", "language_config": language} | language)
    attention, dense = 4 * 1280 * 1280, 3 * 1280 * 6848
    experts = 66 * 3 * 1280 * 896 + 64 * 1280
    count = 12 * (attention + 2 * 1280) + dense + 11 * experts + (2 * 129_280 + 1) * 1280
    assert counted(loaded) == count == 2_934_734_080


@pytest.mark.parametrize(("model_type", "place"), [("internvl_chat", "llm_config"), ("vibevoice", "text_config")])
def test_ties_by_the_decoder_alone(read: Read, model_type: str, place: str) -> None:
    untied = read({"model_type": model_type, place: QWEN, "tie_word_embeddings": True})
    tied = read({"model_type": model_type, place: QWEN | {"tie_word_embeddings": True}})
    assert counted(untied) - counted(tied) == HEAD


@pytest.mark.parametrize(
    ("wrapper", "outer", "inner", "version", "tied"),
    [
        # LLaVA-OneVision 0.5B: the file says no, its text_config says yes, and transformers ties.
        ("llava_onevision", False, True, None, True),
        ("llava_onevision", False, None, None, False),
        ("llava_onevision", True, False, None, True),
        ("gemma3", False, True, None, False),
        # Mistral Small 3.1 states nothing: its class ties, and its decoder, which older versions follow, does not.
        ("mistral3", None, None, None, False),
        ("mistral3", None, None, "5.1.0", False),
        ("mistral3", None, True, "4.50.0", True),
        ("gemma3", None, None, None, True),
        ("gemma3", None, False, None, False),
        # The decoder's class ties, and that of the wrapper does not.
        ("qwen3_vl_moe", None, None, "4.57.0", False),
        ("qwen3_vl_moe", None, True, "4.57.0", True),
        ("qwen3_vl_moe", None, True, "5.1.0", False),
        # Classes of decoders that know no tie.
        ("voxtral_realtime", None, None, "5.1.0", True),
        ("qwen3_vl", None, None, "5.1.0", False),
    ],
)
def test_ties(
    read: Read, wrapper: str, outer: bool | None, inner: bool | None, version: str | None, tied: bool
) -> None:
    text = {key: value for key, value in QWEN.items() if key != "model_type"}
    text |= {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if wrapper != "qwen3_vl_moe":
        text = {key: value for key, value in text.items() if "moe" not in key and "experts" not in key}
    file: Settings = {"model_type": wrapper, "text_config": text}
    if inner is not None:
        text["tie_word_embeddings"] = inner
    if outer is not None:
        file["tie_word_embeddings"] = outer
    if version is not None:
        file["transformers_version"] = version
    assert read(file).spec.tie_embeddings is tied


TIES = {name for name, wrapper in tables().wrappers.items() if wrapper.either or wrapper.alone}
TIES |= {"aya_vision", "deepseek_ocr2", "gemma3", "internvl", "mistral3", "mllama", "qwen2_5_vl", "qwen3_vl"}
"""Wrappers whose class has a rule of its own, and some that have none; building all of them takes a minute."""


@pytest.mark.transformers
@pytest.mark.parametrize("wrapper", sorted(TIES & wrapped_families().keys()))
def test_what_is_stated_ties_as_in_transformers(transformers: Any, wrapper: str) -> None:
    if wrapper not in transformers.CONFIG_MAPPING:
        pytest.skip("transformers does not have it")
    require(transformers, wrapper)
    config_class = transformers.CONFIG_MAPPING[wrapper]
    whole = json.loads(config_class().to_json_string(use_diff=False))
    if "tie_word_embeddings" not in whole or tables().wrappers[wrapper].path != ("text_config",):
        pytest.skip("its class has no tie of its own, or its decoder is elsewhere")
    for outer in (True, False):
        for inner in (True, False, None):
            text = {key: value for key, value in whole["text_config"].items() if key != "tie_word_embeddings"}
            text |= {} if inner is None else {"tie_word_embeddings": inner}
            text |= {"num_experts_per_tok": 2} if wrapper == "deepseek_ocr2" else {}
            file = whole | {"text_config": text, "tie_word_embeddings": outer}
            try:
                built = config_class.from_dict(json.loads(json.dumps(file)))
            except Exception:  # Defaults of some classes are refused by their own validation.
                pytest.skip("transformers does not read its own file")
            spec, _ = read_config(parse_json(json.dumps(file), "config.json"), "model")
            assert spec.tie_embeddings == built.tie_word_embeddings, (outer, inner)


@pytest.mark.parametrize("model_type", sorted(name for name, flat in FLAT.items() if flat.text))
def test_keys_at_the_top(read: Read, model_type: str) -> None:
    text, inert = FLAT[model_type]
    assert text in FAMILIES
    sizes = QWEN | {"tie_word_embeddings": False}
    towers = dict.fromkeys(inert, 7)
    loaded = read(sizes | towers | {"model_type": model_type})
    assert loaded.spec.layers == read(sizes | {"model_type": text}).spec.layers
    assert loaded.notes[0] == alone(model_type)


@pytest.mark.parametrize(
    ("model_type", "version", "text"),
    [
        *((model_type, version, text) for model_type, own in MINICPM_VERSIONS.items() for version, text in own.items()),
        ("minicpmv", 2.6, "qwen2"),
        ("minicpmv", 4, "llama"),
        ("minicpmv", None, "llama"),
    ],
)
def test_versions_of_minicpm(read: Read, model_type: str, version: Any, text: str) -> None:
    file = QWEN | {"model_type": model_type, "version": version, "query_num": 64, "slice_config": {"a": 1}}
    loaded = read(file)
    assert loaded.spec.layers == read(QWEN | {"model_type": text}).spec.layers
    assert loaded.notes[0] == alone(model_type)


def test_minicpm_v_2_is_the_narrow_one(read: Read) -> None:
    file = QWEN | {"hidden_size": 2304, "num_attention_heads": 36, "num_key_value_heads": 36, "query_num": 64}
    assert read(file | {"model_type": "minicpmv"}).spec.tie_embeddings is True


def test_grok_2_calls_itself_git(read: Read) -> None:
    sizes = {"moe_intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "residual_moe": True}
    file = QWEN | sizes | {"model_type": "git", "architectures": ["Grok1ForCausalLM"]}
    assert read(file).spec == read(file | {"model_type": "grok-1"}).spec
    for architectures in ({}, {"architectures": 5}):
        with pytest.raises(InputError, match="model_type 'git' is not supported: its decoder attends to an encoder"):
            read(QWEN | {"model_type": "git"} | architectures)
