"""Small configs with a quantization_config, and the counts by hand that its methods multiply."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

from powerplan.accounting import Accounting
from powerplan.documents import parse_json
from powerplan.dtypes import Dtypes
from powerplan.huggingface import read_config
from powerplan.spec import ModelSpec

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
"""In a layer: q and o of 256 x 256, k and v of 128 x 256, gate and up of 512 x 256, down of 256 x 512."""

ELEMENTS = 2 * (2 * 65_536 + 2 * 32_768 + 3 * 131_072)
WIDE = 2 * (2 * 256_000 + 5 * 256)  # Embedding, LM head and five norms in bf16.
GROUPS = ELEMENTS // 128
BLOCKS = 2 * (4 + 2 + 2 + 4 + 3 * 8)  # 128 x 128
ROWS = 2 * (256 + 128 + 128 + 256 + 512 + 512 + 256)
COLUMNS = 2 * (256 + 256 + 256 + 256 + 256 + 256 + 512)
MATRICES = 2 * 7

MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
}
ATTENTION = 2 * 65_536 + 2 * 32_768
EXPERTS = 8 * 3 * 256 * 128


def int4(**more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True} | more
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def compressed(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized"} | settings


def read(sizes: dict[str, Any], settings: dict[str, Any]) -> tuple[ModelSpec, tuple[str, ...]]:
    return read_config(parse_json(json.dumps(sizes | {"quantization_config": settings}), "mine.json"), "mine")


def stored(spec: ModelSpec, dtypes: Dtypes | None = None) -> Fraction:
    return Accounting(spec).stored_bytes(dtypes or Dtypes())
