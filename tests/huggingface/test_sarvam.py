"""Sarvam's published files, whose keys are those of its own first code, and what they may not say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hf_decoders import Settings

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.load import LoadedModel
from powerplan.mixers import MLA, Attention
from powerplan.rope import YarnScaling

Read = Callable[[Settings], LoadedModel]

MOE: Settings = {
    "model_type": "sarvam_moe",
    "architectures": ["SarvamMoEForCausalLM"],
    "vocab_size": 262_144,
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "num_hidden_layers": 19,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131_072,
    "max_window_layers": 19,
    "moe_intermediate_size": 1024,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 1024,
    "num_experts": 128,
    "num_experts_per_tok": 6,
    "num_shared_experts": 1,
    "output_router_logits": False,
    "rope_scaling": None,
    "rope_theta": 8_000_000,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
}
LATENT: Settings = {
    "model_type": "sarvam_mla",
    "architectures": ["SarvamMLAForCausalLM"],
    "vocab_size": 262_144,
    "hidden_size": 4096,
    "intermediate_size": 16_384,
    "num_hidden_layers": 32,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "first_k_dense_replace": 1,
    "head_dim": 576,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131_072,
    "moe_intermediate_size": 2048,
    "moe_router_enable_expert_bias": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "q_head_dim": 192,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "deepseek_yarn",
    },
    "rope_theta": 10_000,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
}
"""Files of Sarvam 30B and 105B as their own code has them."""


def counted(loaded: LoadedModel) -> int:
    return Accounting(loaded.spec).total_parameters.with_embeddings


def by_hand(mixer: int, norms: int, settings: Settings) -> int:
    """Return the parameters of a model of `settings`, given those of the mixer and of the norms of a layer."""
    hidden, experts, width = settings["hidden_size"], settings["num_experts"], settings["moe_intermediate_size"]
    sparse = (experts + 1) * 3 * hidden * width + experts * (hidden + 1)
    dense, count = 3 * hidden * settings["intermediate_size"], settings["num_hidden_layers"]
    return 2 * settings["vocab_size"] * hidden + hidden + count * (mixer + norms) + dense + (count - 1) * sparse


def test_files_of_the_first_code(read: Read) -> None:
    grouped, latent = read(MOE), read(LATENT)
    assert grouped.notes == latent.notes == ()
    assert counted(grouped) == by_hand(4096 * 64 * (64 + 2 * 4 + 64), 2 * 4096 + 2 * 64, MOE) == 32_152_650_368
    queries, keys = 4096 * 64 * 192, 4096 * (512 + 64) + 512 * 64 * (128 + 128)
    assert counted(latent) == by_hand(queries + keys + 64 * 128 * 4096, 2 * 4096 + 512, LATENT)
    (attention,), (mla,) = grouped.spec.mixers(), latent.spec.mixers()
    assert isinstance(attention, Attention)
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.qk_norm) == (64, 4, 64, "head")
    assert isinstance(mla, MLA)
    assert mla.q_lora_rank is None


def test_biases_and_shared_experts_by_their_first_names(read: Read) -> None:
    more = counted(read(MOE | {"use_qkv_bias": True})) - counted(read(MOE))
    assert more == 19 * (64 + 2 * 4) * 64
    more = counted(read(MOE | {"num_shared_experts": 3})) - counted(read(MOE))
    assert more == 18 * 2 * 3 * 4096 * 1024


def test_yarn_of_deepseek_by_its_other_name(read: Read) -> None:
    scaling: dict[str, Any] = LATENT["rope_scaling"]
    plain = read(LATENT | {"rope_scaling": scaling | {"type": "yarn"}})
    loaded = read(LATENT)
    assert loaded.spec == plain.spec
    (rope,) = loaded.spec.rope_settings
    assert isinstance(rope.scaling, YarnScaling)
    assert (rope.scaling.factor, rope.scaling.original_context) == (40, 4096)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (MOE | {"use_bias": True}, "transformers' sarvam_moe has biases on query, key and value alone"),
        (
            MOE | {"moe_router_enable_expert_bias": False},
            "moe_router_enable_expert_bias false is not supported: transformers' sarvam_moe always has that bias",
        ),
        (
            LATENT | {"moe_shared_expert_intermediate_size": 4096},
            "moe_shared_expert_intermediate_size is 4096, and moe_intermediate_size makes it 2,048",
        ),
        (LATENT | {"q_head_dim": 128}, "q_head_dim is 128, and qk_nope_head_dim + qk_rope_head_dim makes it 192"),
    ],
)
def test_refusals(read: Read, settings: Settings, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        read(settings)
