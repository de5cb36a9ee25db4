"""What the readers refuse: the whole message, and the line and column of the value that is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.accounting import Accounting
from powerplan.documents import parse_json
from powerplan.errors import InputError
from powerplan.huggingface import FAMILIES, read_config
from powerplan.load import LoadedModel
from powerplan.spec import ModelSpec

Settings = dict[str, Any]
Read = Callable[[Settings], LoadedModel]

GROUPED: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA = {"model_type": "llama"} | GROUPED
GPT2: Settings = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 6}
DEEPSEEK = {"model_type": "deepseek_v2", "num_experts_per_tok": 2} | GROUPED
LISTED = "powerplan models --families lists what is"
NEAREST = "its keys are most like those of llama: --like llama reads it so"
FULL, SLIDING = "full_attention", "sliding_attention"


def place(config: Settings, *path: str | int) -> tuple[int, int]:
    """Return line and column of the value at `path` in the config as `read` writes it, one key to a line."""
    lines = json.dumps(config, indent=2).splitlines()
    start, column = 0, 1
    for depth, key in enumerate(path, start=1):
        if isinstance(key, int):
            start, column = start + 1 + key, 2 * depth + 1
            continue
        opening = f'{"  " * depth}"{key}": '
        start = next(index for index in range(start, len(lines)) if lines[index].startswith(opening))
        column = len(opening) + 1
    return start + 1, column


def check_refused(read: Read, tmp_path: Path, config: Settings, path: tuple[str | int, ...], message: str) -> None:
    line, column = place(config, *path)
    expected = f"{tmp_path / 'config.json'}:{line}:{column}: {message}"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        read(config)


def test_place_finds_the_value() -> None:
    config = {"a": 1, "text_config": {"a": 2}}
    assert place(config) == (1, 1)
    assert place(config, "a") == (2, 8)
    assert place(config, "text_config", "a") == (4, 10)


def without(config: Settings, key: str) -> Settings:
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize(
    ("config", "path", "message"),
    [
        (
            {"hidden_size": 48},
            (),
            "has no model_type, so its family is unknown; a powerplan spec is YAML, with a .yaml suffix",
        ),
        (LLAMA | {"model_type": 3}, ("model_type",), "model_type must be a word, and is 3"),
        (
            LLAMA | {"model_type": "lama"},
            ("model_type",),
            f"model_type 'lama' is not supported; did you mean llama? {LISTED}",
        ),
        (
            LLAMA | {"model_type": "deepseek_v5"},
            ("model_type",),
            f"model_type 'deepseek_v5' is not supported; did you mean deepseek_vl? {LISTED}",
        ),
        (LLAMA | {"model_type": "z9"}, ("model_type",), f"model_type 'z9' is not supported; {NEAREST}; {LISTED}"),
        (
            {"model_type": "llava", "text_config": {"model_type": "t5"}},
            ("model_type",),
            f"model_type 'llava' with text_config of 't5' is not supported; {LISTED}",
        ),
        (
            {"name": "x", "model_type": "gemma3"},
            ("model_type",),
            "gemma3 needs text_config, and the file has none",
        ),
        (
            {"model_type": "internvl_chat", "vision_config": {}},
            ("model_type",),
            "internvl_chat needs llm_config, and the file has none",
        ),
        (
            {"model_type": "internvl_chat", "llm_config": LLAMA | {"model_type": None}},
            ("llm_config",),
            "llm_config needs model_type, and the file has none",
        ),
        (
            {"model_type": "internvl_chat", "llm_config": [1]},
            ("llm_config",),
            "llm_config must be an object, and is [1]",
        ),
        (
            {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": 5}},
            ("thinker_config", "text_config"),
            "thinker_config.text_config must be an object, and is 5",
        ),
        (
            {"model_type": "qwen3_omni_moe", "thinker_config": {}},
            ("model_type",),
            "qwen3_omni_moe needs thinker_config.text_config, and the file has none",
        ),
        (
            LLAMA | {"model_type": "minicpmv", "version": 9},
            ("version",),
            "version 9 of minicpmv is not known; known are 2.0, 2.5, 2.6, 4, 4.0, 4.5",
        ),
        (
            LLAMA | {"model_type": "minicpmo"},
            ("model_type",),
            "minicpmo needs version, and the file has none; known are 2.6, 4.5",
        ),
        (
            LLAMA | {"model_type": "t5"},
            ("model_type",),
            "model_type 't5' is not supported: its decoder attends to an encoder, which is not counted",
        ),
    ],
)
def test_family(read: Read, tmp_path: Path, config: Settings, path: tuple[str | int, ...], message: str) -> None:
    check_refused(read, tmp_path, config, path, message)


def test_config_that_is_not_an_object(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^mine\.json:1:1: a config\.json is an object, and this is not one$"):
        read_config(parse_json("[1]", "mine.json"), "mine")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (LLAMA, "vocab_size"),
        (LLAMA, "hidden_size"),
        (LLAMA, "intermediate_size"),
        (LLAMA, "num_hidden_layers"),
        (LLAMA, "num_attention_heads"),
        (GPT2, "n_embd"),
        (DEEPSEEK, "num_attention_heads"),
        (DEEPSEEK, "num_experts_per_tok"),
    ],
)
def test_sizes_without_a_default(read: Read, tmp_path: Path, config: Settings, key: str) -> None:
    message = f"{config['model_type']} needs {key}, and the file has none"
    check_refused(read, tmp_path, without(config, key), (), message)
    null = f"{config['model_type']} needs {key}, and it is null"
    check_refused(read, tmp_path, config | {key: None}, (key,), null)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("48", "hidden_size must be an integer, and is '48'"),
        (48.0, "hidden_size must be an integer, and is 48.0"),
        ([48], "hidden_size must be an integer, and is [48]"),
        (0, "hidden_size 0 is out of range; allowed are 1 to 1,000,000,000"),
        (-48, "hidden_size -48 is out of range; allowed are 1 to 1,000,000,000"),
        (10**9 + 1, "hidden_size 1000000001 is out of range; allowed are 1 to 1,000,000,000"),
    ],
)
def test_integer(read: Read, tmp_path: Path, wrong: Any, problem: str) -> None:
    check_refused(read, tmp_path, LLAMA | {"hidden_size": wrong}, ("hidden_size",), problem)
    text = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 2, "hidden_size": wrong}}
    check_refused(read, tmp_path, text, ("text_config", "hidden_size"), problem)


def test_a_boolean_is_no_integer(read: Read) -> None:
    config = LLAMA | {"hidden_size": True}
    line, column = place(config, "hidden_size")
    with pytest.raises(InputError, match=rf":{line}:{column}: hidden_size must be an integer, and is [Tt]rue$"):
        read(config)


@pytest.mark.parametrize(
    ("family", "stated", "key", "problem"),
    [
        ("llama", {"attention_bias": "no"}, "attention_bias", "must be true or false, and is 'no'"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings", "must be true or false, and is 1"),
        ("qwen2", {"use_sliding_window": 0}, "use_sliding_window", "must be true or false, and is 0"),
        ("mistral", {"sliding_window": "4k"}, "sliding_window", "must be an integer, and is '4k'"),
        ("mistral", {"sliding_window": 0}, "sliding_window", "0 is out of range; allowed are 1 to 1,000,000,000"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers", "must be a list of integers, and is 3"),
        ("qwen3_moe", {"mlp_only_layers": [1.5]}, "mlp_only_layers", "must be a list of integers, and is [1.5]"),
        ("llama", {"layer_types": FULL}, "layer_types", "must be a list of words, and is 'full_attention'"),
        ("llama", {"layer_types": [1]}, "layer_types", "must be a list of words, and is [1]"),
        ("deepseek_v3", {"moe_layer_freq": [0, 1]}, "moe_layer_freq", "must have 0 or 1 for each of 4 layers"),
        (
            "granitemoehybrid",
            {"layer_types": ["mamba"]},
            "layer_types",
            "must say mamba or attention for each of 4 layers",
        ),
        (
            "zamba",
            {"layers_block_type": ["mlp"] * 4},
            "layers_block_type",
            "must say mamba or hybrid for each of 4 layers",
        ),
        ("llama", {"num_hidden_layers": 10_001}, "num_hidden_layers", "10001 is out of range; allowed are 1 to 10,000"),
        (
            "gemma3_text",
            {"num_hidden_layers": 10_001},
            "num_hidden_layers",
            "10001 is out of range; allowed are 1 to 10,000",
        ),
    ],
)
def test_types_and_ranges(read: Read, tmp_path: Path, family: str, stated: Settings, key: str, problem: str) -> None:
    check_refused(read, tmp_path, {"model_type": family} | GROUPED | stated, (key,), f"{key} {problem}")


@pytest.mark.parametrize(
    ("config", "path", "message"),
    [
        (
            LLAMA | {"num_key_value_heads": 4},
            ("num_key_value_heads",),
            "num_key_value_heads 4 does not divide num_attention_heads 6",
        ),
        (
            LLAMA | {"num_key_value_heads": 12},
            ("num_key_value_heads",),
            "num_key_value_heads 12 does not divide num_attention_heads 6",
        ),
        (
            LLAMA | {"hidden_size": 50},
            ("hidden_size",),
            "hidden_size 50 is not a multiple of num_attention_heads 6, and there is no head_dim",
        ),
        (
            GPT2 | {"n_head": 5},
            ("n_embd",),
            "hidden_size 48 is not a multiple of num_attention_heads 5, and there is no head_dim",
        ),
        (
            LLAMA | {"layer_types": [FULL] * 3},
            ("layer_types",),
            "layer_types has 3 entries for 4 layers",
        ),
        (
            {"model_type": "gemma3", "text_config": {"layer_types": [FULL] * 3}},
            ("text_config", "layer_types"),
            "layer_types has 3 entries for 26 layers",
        ),
        (
            LLAMA | {"layer_types": [FULL, FULL, "chunked_attention", FULL]},
            ("layer_types", 2),
            "layer_types[2] 'chunked_attention' is not supported for llama",
        ),
        (
            {"model_type": "qwen3", "sliding_window": 9, "layer_types": [FULL, SLIDING, FULL, FULL]} | GROUPED,
            ("layer_types",),
            "layer 1 is sliding_attention, and there is no sliding_window in force",
        ),
        (
            {"model_type": "gemma2", "sliding_window": None} | GROUPED,
            (),
            "layer 0 is sliding_attention, and there is no sliding_window in force",
        ),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9} | GROUPED,
            ("num_experts_per_tok",),
            "num_experts_per_tok 9 is more than the 8 experts",
        ),
        (
            {"model_type": "gpt_oss", "num_local_experts": 4, "experts_per_token": 5} | GROUPED,
            ("experts_per_token",),
            "num_experts_per_tok 5 is more than the 4 experts",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 4} | GROUPED,
            (),
            "num_experts_per_tok 8 is more than the 4 experts",
        ),
        (
            DEEPSEEK | {"n_routed_experts": 1},
            ("num_experts_per_tok",),
            "num_experts_per_tok 2 is more than the 1 experts",
        ),
        (
            {"model_type": "gemma3", "tie_word_embeddings": "yes", "text_config": {}},
            ("tie_word_embeddings",),
            "tie_word_embeddings must be true or false, and is 'yes'",
        ),
    ],
)
def test_contradictions(
    read: Read, tmp_path: Path, config: Settings, path: tuple[str | int, ...], message: str
) -> None:
    check_refused(read, tmp_path, config, path, message)


INDEXER = "sparse attention with an indexer (DeepSeek-V3.2) is not MLA alone"


@pytest.mark.parametrize(
    ("family", "key", "because"),
    [
        ("llama", "add_cross_attention", "powerplan plans decoders without cross-attention"),
        ("gemma2", "use_bidirectional_attention", "powerplan counts causal attention"),
        ("gemma3_text", "use_bidirectional_attention", "powerplan counts causal attention"),
        ("deepseek_v2", "index_topk", INDEXER),
        ("deepseek_v3", "index_topk", INDEXER),
        ("kimi_k2", "index_n_heads", INDEXER),
    ],
)
def test_settings_that_would_change_the_count(read: Read, tmp_path: Path, family: str, key: str, because: str) -> None:
    experts = {} if family in ("llama", "gemma2", "gemma3_text") else {"num_experts_per_tok": 2}
    config = {"model_type": family} | experts | GROUPED
    check_refused(read, tmp_path, config | {key: 64}, (key,), f"{key} 64 is not supported: {because}")
    for harmless in (None, False, 0):
        assert read(config | {key: harmless}).spec == read(config).spec


KEYS = [
    *GROUPED,
    "_name_or_path",
    "architectures",
    "attention_bias",
    "decoder_sparse_step",
    "experts_per_token",
    "first_k_dense_replace",
    "head_dim",
    "kv_lora_rank",
    "layer_types",
    "max_window_layers",
    "mlp_only_layers",
    "moe_layer_freq",
    "n_inner",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "q_lora_rank",
    "sliding_window",
    "sliding_window_pattern",
    "text_config",
    "tie_word_embeddings",
    "topk_method",
    "use_sliding_window",
]
words = st.text(max_size=6) | st.sampled_from([FULL, SLIDING, "llama", "gemma3_text"])
scalars = st.none() | st.booleans() | st.integers(-3, 9) | st.integers() | st.floats(allow_nan=False) | words
values = scalars | st.lists(scalars, max_size=5) | st.dictionaries(st.sampled_from(KEYS) | words, scalars, max_size=3)


def outcome(data: Any) -> ModelSpec | InputError:
    try:
        return read_config(parse_json(json.dumps(data), "mine.json"), "mine")[0]
    except InputError as error:
        return error


@given(
    family=st.sampled_from([*sorted(FAMILIES), "gemma3", "kimi_k25"]),
    nested=st.booleans(),
    changes=st.dictionaries(st.sampled_from(KEYS), values, max_size=4),
)
def test_any_file_is_read_or_refused_with_its_place(family: str, nested: bool, changes: Settings) -> None:
    config = GROUPED | changes
    result = outcome({"model_type": family} | ({"text_config": config} if nested else config))
    if isinstance(result, InputError):
        assert re.fullmatch(r"mine\.json:\d+:\d+", result.where or "")
    else:
        assert Accounting(result).total_parameters.with_embeddings > result.vocab_size * result.hidden_size
