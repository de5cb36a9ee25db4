"""quantization_config: bytes of every method that is read, by hand, and what stays wide."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from quantized import BLOCKS, COLUMNS, ELEMENTS, GROUPS, LLAMA, MATRICES, ROWS, WIDE, compressed, int4, read, stored

from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.documents import parse_json
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError
from powerplan.huggingface import read_config

DATA = Path(__file__).parent.parent / "data" / "quantization"

BY_HAND: dict[str, tuple[dict[str, Any], str, int | float]] = {
    "fp8 in blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"},
        "fp8",
        ELEMENTS + 4 * BLOCKS,
    ),
    "fp8 in blocks, scales of a byte": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        "fp8",
        ELEMENTS + BLOCKS,
    ),
    "fp8 per matrix": ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8", ELEMENTS + 4 * MATRICES),
    "fp8 per output": ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8", ELEMENTS + 4 * ROWS),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
        "gptq int4",
        ELEMENTS / 2 + GROUPS * 2.5 + 4 * COLUMNS,
    ),
    "gptq, one group": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1},
        "gptq int8",
        ELEMENTS + ROWS * 3 + 4 * COLUMNS,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        "awq int4",
        ELEMENTS / 2 + GROUPS * 2.5,
    ),
    "awq without zeros": (
        {"quant_method": "awq", "w_bit": 4, "group_size": 128, "zero_point": False},
        "awq int4",
        ELEMENTS / 2 + GROUPS * 2,
    ),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes nf4",
        ELEMENTS / 2 + ELEMENTS // 64 * 4,
    ),
    # A byte for 64 weights, and 4 bytes for 256 of these: 4 in q and o, 2 in k and v, 8 in each of the MLP's.
    "nf4 with double quantization": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "bitsandbytes nf4",
        ELEMENTS / 2 + ELEMENTS // 64 + 4 * 2 * (4 + 2 + 2 + 4 + 3 * 8),
    ),
    "bitsandbytes in 8 bits": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        "bitsandbytes int8",
        ELEMENTS + 4 * ROWS,
    ),
    "compressed-tensors": (compressed(**int4()), "compressed-tensors int4", ELEMENTS / 2 + GROUPS * 2),
    "compressed-tensors with zeros": (
        compressed(**int4(symmetric=False)),
        "compressed-tensors int4",
        ELEMENTS / 2 + GROUPS * 2.5,
    ),
    "compressed-tensors per channel": (
        compressed(**int4(num_bits=8, strategy="channel", group_size=None)),
        "compressed-tensors int8",
        ELEMENTS + 2 * ROWS,
    ),
    "compressed-tensors fp8 in blocks": (
        compressed(**int4(num_bits=8, type="float", strategy="block", block_structure=[128, 128], group_size=None)),
        "compressed-tensors fp8",
        ELEMENTS + 2 * BLOCKS,
    ),
    "compressed-tensors nvfp4": (
        compressed(**int4(type="float", strategy="tensor_group", group_size=16)),
        "compressed-tensors nvfp4",
        ELEMENTS / 2 + ELEMENTS // 16 + 4 * MATRICES,
    ),
    "modelopt nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "modelopt nvfp4",
        ELEMENTS / 2 + ELEMENTS // 16 + 4 * MATRICES,
    ),
    "modelopt nvfp4 in groups": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"} | int4(type="float", strategy=None, group_size=16),
        "modelopt nvfp4",
        ELEMENTS / 2 + ELEMENTS // 16 + 4 * MATRICES,
    ),
    "modelopt fp8": (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        "modelopt fp8",
        ELEMENTS + 4 * MATRICES,
    ),
    "nvfp4 of transformers": ({"quant_method": "nvfp4"}, "nvfp4", ELEMENTS / 2 + ELEMENTS // 16 + 4 * MATRICES),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True},
        "auto-round int4",
        ELEMENTS / 2 + GROUPS * 2.5,
    ),
    "hqq": (
        {
            "quant_method": "hqq",
            "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}},
            "skip_modules": ["lm_head"],
        },
        "hqq int4",
        ELEMENTS / 2 + ELEMENTS // 64 * 4,
    ),
    "torchao": (
        {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 32}}},
        },
        "torchao int4",
        ELEMENTS / 2 + ELEMENTS // 32 * 4,
    ),
    "quark": (
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}},
            "exclude": ["lm_head"],
        },
        "quark mxfp4",
        ELEMENTS / 2 + ELEMENTS // 32,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_bytes_by_hand(name: str) -> None:
    settings, method, quantized = BY_HAND[name]
    spec, notes = read(LLAMA, settings)
    assert notes == ()
    assert spec.quantization is not None
    assert spec.quantization.method == method
    assert stored(spec) == quantized + WIDE
    assert stored(spec, Dtypes("fp32")) == quantized + 2 * WIDE
    assert stored(spec, Dtypes("fp8", weights_dtype="bf16")) == 2 * ELEMENTS + WIDE
    accounting = Accounting(spec)
    assert accounting.read_bytes(Dtypes()) == quantized + WIDE - 2 * 256_000  # All but the input embedding.
    plain = Accounting(read_config(parse_json(json.dumps(LLAMA), "mine.json"), "mine")[0])
    assert accounting.weight_flops_per_token == plain.weight_flops_per_token
    assert accounting.total_parameters == plain.total_parameters


def test_gpt_oss_120b_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    """4.25 bits for 36 x 128 x 3 x 2880 x 2880 weights of experts, bf16 for the other 2,167,371,072."""
    assert main(["decode", str(DATA / "gpt-oss-120b.json"), "--ctx", "8k", "--format", "json"]) == 0
    captured = capsys.readouterr()
    (model,) = json.loads(captured.out)["models"]
    assert captured.err == ""
    assert model["quantization"] == "mxfp4"
    assert model["stored_bytes"] == 65_248_815_744 == 114_661_785_600 * 17 // 32 + 2 * 2_167_371_072
    assert model["contexts"][0]["cache_bytes_per_token"] == 73_728
    step = model["contexts"][0]["steps"][0]
    chosen = 36 * 4 * 3 * 2880 * 2880
    idle = 36 * 124 * 3 * 2880  # Biases of experts that are not chosen.
    assert step["weight_bytes"] == chosen * 17 // 32 + 2 * (2_167_371_072 - idle - 201_088 * 2880)


def test_a_wrapper_states_the_quantization_of_its_text_decoder() -> None:
    path = DATA / "kimi-k2.5-nvfp4.json"
    spec, notes = read_config(parse_json(path.read_text(), "config.json"), "k25")
    assert notes == ("kimi_k25: the text decoder alone is counted, other towers and projectors are not",)
    assert spec.quantization is not None
    (rule,) = spec.quantization.rules
    assert set(rule.parts) == {"mixers", "mlp", "experts", "shared_experts"}
    experts = 60 * 384 * 3
    attention = 1536 * 7168 + 64 * 192 * 1536 + 576 * 7168 + 64 * 256 * 512 + 7168 * 8192
    elements = (experts + 60 * 3) * 7168 * 2048 + 61 * attention + 3 * 7168 * 18_432
    matrices = experts + 60 * 3 + 61 * 5 + 3
    total = Accounting(spec).total_parameters.with_embeddings
    assert stored(spec) == elements * Fraction(9, 16) + 4 * matrices + 2 * (total - elements)


def test_the_settings_of_the_file_count_before_those_of_its_text_config() -> None:
    fp8, gptq = {"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}
    wrapper = {"model_type": "mistral3", "text_config": LLAMA | {"model_type": "llama", "quantization_config": gptq}}
    spec, notes = read(wrapper, fp8)
    assert spec.quantization is not None
    assert spec.quantization.method == "fp8"
    assert notes[-1] == "text_config has another quantization_config than the file around it, which counts"
    spec, _ = read_config(parse_json(json.dumps(wrapper), "mine.json"), "mine")
    assert spec.quantization is not None
    assert spec.quantization.method == "gptq int4"


def test_a_cache_that_the_file_quantizes_is_said() -> None:
    _, notes = read(LLAMA, compressed(**int4(), kv_cache_scheme={"num_bits": 8, "type": "float"}))
    assert notes == ("kv_cache_scheme is not read: the cache's bytes follow cache_dtype",)
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    _, notes = read(LLAMA, {"quant_method": "modelopt", "quantization": inner})
    assert notes == ("the format of the cache is not read: its bytes follow cache_dtype",)


def test_nothing_to_quantize_is_said() -> None:
    spec, notes = read(LLAMA, {"quant_method": "mxfp4"})
    assert spec.quantization is None
    assert notes == ("quantization_config (mxfp4) covers no matrix that is counted",)


HQQ_WEIGHTS = {"nbits": 4, "group_size": 64}
NOT_UNDERSTOOD: dict[str, tuple[dict[str, Any], str]] = {
    "no method": ({"bits": 4}, "it has no quant_method"),
    "a method": ({"quant_method": "vptq"}, "quant_method 'vptq'"),
    "a method that is no word": ({"quant_method": ["fp8"]}, "quant_method ['fp8']"),
    "an expert dtype": ({"quant_method": "fp8", "expert_dtype": "int3"}, "expert_dtype 'int3'"),
    "bits": ({"quant_method": "gptq", "bits": 5}, "bits 5"),
    "no bits": ({"quant_method": "awq"}, "bits null"),
    "a group of 0": ({"quant_method": "awq", "bits": 4, "group_size": 0}, "group_size 0"),
    "gptq dynamic": ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic '+:.*'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "bitsandbytes with neither load_in_4bit nor load_in_8bit"),
    "dense": (compressed(format="dense", **int4()), "compressed-tensors with format dense"),
    "sparse": (
        compressed(sparsity_config={"format": "sparse-24-bitmask"}, **int4()),
        "compressed-tensors with sparsity_config",
    ),
    "no groups": (compressed(), "no config_groups"),
    "groups by name": (compressed(config_groups={"W4A16": ["Linear"]}), "config_groups {W4A16: ['Linear']}"),
    "a strategy": (compressed(**int4(strategy="token")), "strategy 'token'"),
    "floats of 6 bits": (compressed(**int4(num_bits=6, type="float")), "'float' of 6 bits"),
    "floats in groups": (compressed(**int4(type="float", group_size=64)), "floats of 4 bits in groups of 64"),
    "a regex": (compressed(**int4() | {"ignore": ["re:(a+)+$"]}), "the pattern '(a+)+$'"),
    "patterns": (
        compressed(**int4() | {"ignore": [f"*a{i}*" for i in range(2000)]}),
        "a list of too many patterns",
    ),
    "an algorithm": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
    "groups of nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32},
        "NVFP4 in groups of 32",
    ),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "data_type": "w4"},
        "auto-round of 4 bits of 'w4'",
    ),
    "hqq of 3 bits": (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": HQQ_WEIGHTS | {"nbits": 3}}},
        "nbits 3",
    ),
    "hqq of many": (
        {"quant_method": "hqq", "quant_config": {"self_attn.q_proj": {"weight_quant_params": HQQ_WEIGHTS}}},
        "hqq with more than one set of weight_quant_params, or none",
    ),
    "torchao's old words": (
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        "torchao's 'int8_weight_only'",
    ),
    "quark's layers": (
        {"quant_method": "quark", "layer_quant_config": {"a": {}}},
        "quark without one format for all weights",
    ),
    "quark's formats": (
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int3", "qscheme": "per_group"}}},
        "quark's 'int3', 'per_group'",
    ),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_said(name: str) -> None:
    settings, problem = NOT_UNDERSTOOD[name]
    spec, notes = read(LLAMA, settings)
    assert spec.quantization is None
    assert notes == (f"quantization_config is not understood ({problem}): bytes follow dtype",)
    assert stored(spec) == 2 * ELEMENTS + WIDE


REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([4], "quantization_config must be an object, and is [4]"),
    "bits as a word": ({"quant_method": "gptq", "bits": "4"}, "bits must be an integer, and is '4'"),
    "a group": ({"quant_method": "gptq", "bits": 4, "group_size": -2}, "group_size -2 is out of range; ..."),
    "one block size": (
        {"quant_method": "fp8", "weight_block_size": [128]},
        "weight_block_size must be two sizes, and is [128]",
    ),
    "a huge block": (
        {"quant_method": "fp8", "weight_block_size": [10**12, 128]},
        "quantization_config: Expected `int` <= 1000000000 - at `$[0].block_rows`",
    ),
    "modules that are numbers": (
        {"quant_method": "fp8", "modules_to_not_convert": [1]},
        "modules_to_not_convert must be a list of words, and is [1]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_another_type_are_refused_with_their_place(name: str) -> None:
    settings, problem = REFUSED[name]
    with pytest.raises(InputError) as caught:
        read(LLAMA, settings)
    assert caught.value.where is not None
    assert caught.value.where.startswith("mine.json:1:")
    assert caught.value.problem.startswith(problem.removesuffix("..."))
