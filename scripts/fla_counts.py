"""Count the parameters of models that flash-linear-attention builds, on the meta device, for tests of the readers.

Usage: python scripts/fla_counts.py tests/data/fla_parameter_counts.json, where flash-linear-attention and triton are
installed. They are no dependency of the tests, which read the counts from the file.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

SMALL_CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "tie_word_embeddings": False,
}
"""Fields of every config, unless its case sets them."""

HYBRID_ATTENTION = {"layers": [1], "num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "window_size": 64}
"""Softmax attention in some layers of a hybrid model: the field `attn` of its config."""

CASES: dict[str, list[dict[str, Any]]] = {
    "gla": [
        {"num_heads": 4},
        {"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0, "use_output_gate": False},
        {"num_heads": 4, "use_short_conv": True, "conv_size": 3, "elementwise_affine": False},
        {"num_heads": 4, "intermediate_size": 500, "tie_word_embeddings": True, "attn": HYBRID_ATTENTION},
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "retnet": [
        {"num_heads": 4},
        {"num_heads": 6, "expand_v": 1.0, "use_output_gate": False, "hidden_ratio": 3},
        {
            "num_heads": 4,
            "elementwise_affine": False,
            "attn": [HYBRID_ATTENTION, HYBRID_ATTENTION | {"layers": [2], "num_heads": 4}],
        },
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "delta_net": [
        {"num_heads": 4},
        {"num_heads": 2, "expand_k": 0.5, "expand_v": 2.0, "use_gate": True},
        {"num_heads": 4, "use_short_conv": False},
        {"num_heads": 4, "conv_size": 7, "attn": HYBRID_ATTENTION},
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "gated_deltanet": [
        {"num_heads": 2, "head_dim": 64},
        {"num_heads": 2, "head_dim": 64, "num_v_heads": 6, "expand_v": 1.0},
        {"num_heads": 3, "head_dim": 32, "use_gate": False, "use_short_conv": False},
        {"num_heads": 3, "head_dim": 32, "attn": HYBRID_ATTENTION, "hidden_ratio": 5},
        {"hidden_size": 2048, "num_hidden_layers": 21, "vocab_size": 32000},
    ],
    "kda": [
        {"num_heads": 2, "head_dim": 64},
        {"num_heads": 2, "head_dim": 32, "num_v_heads": 4, "expand_v": 2.0},
        {"num_heads": 2, "head_dim": 64, "use_short_conv": False},
        {"num_heads": 2, "head_dim": 64, "attn": HYBRID_ATTENTION},
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "gsa": [
        {"num_heads": 4},
        {"num_heads": 4, "num_slots": 16, "elementwise_affine": False},
        {"num_heads": 2, "use_short_conv": True, "conv_size": 3},
        {"num_heads": 4, "num_slots": None, "attn": HYBRID_ATTENTION},
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "rwkv7": [
        {},
        {"head_dim": 32, "v_low_rank_dim": 24, "decay_low_rank_dim": 40, "norm_bias": False},
        {"norm_first": False, "intermediate_size": 300},
        {"head_dim": None, "num_heads": 6, "hidden_ratio": 3},
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "vocab_size": 65536,
            "v_low_rank_dim": 32,
            "intermediate_size": 4096,
        },
    ],
    "forgetting_transformer": [
        {"num_heads": 6},
        {"num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True},
        {"num_heads": 6, "use_output_gate": True, "window_size": 33},
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "transformer": [
        {"num_heads": 6},
        {"num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True},
        {"num_heads": 6, "window_size": 33, "intermediate_size": 77},
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "nsa": [
        {"num_heads": 16, "num_kv_heads": 1},
        {"num_heads": 32, "num_kv_heads": 2, "head_dim": 16, "qkv_bias": True},
        {"block_size": 32, "block_counts": 8, "window_size": 100},
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "moba": [
        {"num_heads": 6},
        {"num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True},
        {"num_heads": 4, "moba_chunk_size": 64, "moba_topk": 2},
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "log_linear_mamba2": [
        {"head_dim": 64},
        {"head_dim": 32, "state_size": 64, "n_groups": 3, "use_conv_bias": False},
        {"head_dim": 64, "use_bias": True, "expand": 4, "rmsnorm": False},
        {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    ],
    "mamba2": [
        {"num_heads": 6, "head_dim": 64, "n_groups": 1},
        {"num_heads": 12, "head_dim": 32, "n_groups": 3, "rmsnorm": False},
    ],
}
"""Cases of each family: the fields of a config that differ from SMALL_CONFIG."""


def main() -> int:
    """Build every case, count its parameters, and write configs and counts to the file of the command line."""
    warnings.simplefilter("ignore")
    fla: Any = importlib.import_module("fla")
    transformers: Any = importlib.import_module("transformers")
    # The layer refuses to be built without FlashAttention, which nothing here runs.
    importlib.import_module("fla.layers.attn").flash_attn_func = object()  # type: ignore[attr-defined]
    mamba2: Any = importlib.import_module("fla.models.mamba2")
    classes = {"mamba2": (mamba2.Mamba2Config, mamba2.Mamba2ForCausalLM)}
    rows = []
    for family, cases in CASES.items():
        for case in cases:
            settings = SMALL_CONFIG | case
            if family in classes:
                make_config, make_model = classes[family]
                config = make_config(**{key: value for key, value in settings.items() if key != "num_heads"})
            else:
                config = transformers.AutoConfig.for_model(family, **settings)
            with torch.device("meta"):
                build = make_model if family in classes else transformers.AutoModelForCausalLM.from_config
                model = build(config)
            fields = settings | {"model_type": family}
            if family == "rwkv7":
                ranks = ("decay_low_rank_dim", "gate_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim")
                fields |= {rank: getattr(config, rank) for rank in ranks}
            count = sum(parameter.numel() for parameter in model.parameters())
            rows.append({"config": fields, "params": count})
    data = {"made_with": f"flash-linear-attention {fla.__version__}, scripts/fla_counts.py", "models": rows}
    text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps(data["made_with"])
    Path(sys.argv[1]).write_text(f'{{"made_with": {head}, "models": [\n{text}\n]}}\n', encoding="utf-8")
    sys.stdout.write(f"{len(rows)} models\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
