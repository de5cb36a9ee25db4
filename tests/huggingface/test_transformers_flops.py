"""FLOPs of transformers' own forward passes, as torch's FlopCounterMode sees them, against powerplan's: to the FLOP.

The counter reads shapes of aten.mm, addmm and bmm, 2 FLOPs per multiply-add. Where it and powerplan differ, the tests
state by how much and why; no comparison here has a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hf_decoders import require

from powerplan.accounting import Accounting
from powerplan.load import LoadedModel
from powerplan.mixers import Attention, Convention
from powerplan.spec import ModelSpec

pytestmark = pytest.mark.transformers

Settings = dict[str, Any]
Read = Callable[[Settings], LoadedModel]

TOKENS = 48
FULL = Convention(causal="full", form="recurrent", lm_head=True)
"""Products of dense tensors compute the masked scores as well: every query against all t keys."""

GROUPED: Settings = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: Settings = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
}
LATENT = (
    GROUPED
    | EXPERTS
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 14,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
    }
)
MODELS: dict[str, Settings] = {
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 72, "n_positions": TOKENS},
    "llama": GROUPED | {"head_dim": 12, "attention_bias": True},
    "mistral": GROUPED | {"sliding_window": 10},
    "mixtral": GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
    "qwen3": GROUPED | {"head_dim": 12},
    "qwen3_moe": GROUPED
    | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "gemma2": GROUPED | {"head_dim": 12, "sliding_window": 10},
    "gemma3": GROUPED | {"head_dim": 12, "sliding_window": 10, "sliding_window_pattern": 2},
    "gemma3_text": GROUPED | {"head_dim": 12, "sliding_window": 10, "sliding_window_pattern": 3},
    "olmo2": GROUPED,
    "gpt_oss": GROUPED | {"head_dim": 12, "sliding_window": 10, "num_local_experts": 5, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"q_lora_rank": None},
    "kimi_k2": LATENT | {"n_group": 1, "topk_group": 1},
    "starcoder2": GROUPED | {"use_bias": True, "tie_word_embeddings": False},
    "apertus1p5_text": GROUPED | {"output_vocab_size": 61},
    "exaone": GROUPED | {"head_dim": 12},
    "sarvam_mla": LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "sarvam_moe": GROUPED | EXPERTS | {"head_dim": 12, "n_group": 1, "topk_group": 1},
}
CLASSES = {"gemma3": "gemma3_text", "kimi_k2": "deepseek_v3"}
"""model_type of the class that builds the decoder, where the family's own is a wrapper's or is not in transformers."""

# A window costs transformers nothing less: on dense tensors it is a mask over all 48 keys. Per layer with a window of
# 10 that is 2 H (k + v) (48 - 10) 48 FLOPs more than the keys in the window take, H = 4.
WINDOW_GAPS = {
    "mistral": 3 * 2 * 4 * (8 + 8) * 38 * 48,
    "qwen2": 2 * 2 * 4 * (8 + 8) * 38 * 48,
    "gemma2": 2 * 2 * 4 * (12 + 12) * 38 * 48,
    "gemma3": 2 * 2 * 4 * (12 + 12) * 38 * 48,
    "gemma3_text": 2 * 2 * 4 * (12 + 12) * 38 * 48,
    "gpt_oss": 2 * 2 * 4 * (12 + 12) * 38 * 48,
}
# aten._grouped_mm, transformers' default for experts, is not in the counter's registry: the three matrices of each
# chosen expert go unseen, 2 FLOPs x 3 m f x top_k x 48 tokens in every layer that has experts, m = 32.
GROUPED_MM_GAPS = {
    "mixtral": 3 * 2 * 3 * 32 * 56 * 2 * 48,
    "qwen3_moe": 2 * 2 * 3 * 32 * 24 * 2 * 48,
    "gpt_oss": 3 * 2 * 3 * 32 * 56 * 2 * 48,
    "deepseek_v2": 2 * 2 * 3 * 32 * 24 * 3 * 48,
    "deepseek_v3": 2 * 2 * 3 * 32 * 24 * 3 * 48,
    "kimi_k2": 2 * 2 * 3 * 32 * 24 * 3 * 48,
    "sarvam_mla": 2 * 2 * 3 * 32 * 24 * 3 * 48,
    "sarvam_moe": 2 * 2 * 3 * 32 * 24 * 3 * 48,
}
# aten._scaled_dot_product_flash_attention_for_cpu is not in the registry either (its CUDA counterparts are): QK^T and
# AV go unseen, 2 H (k + v) 48 48 in every layer. MLA's k = 12 and v = 10 differ, which that kernel does not take: torch
# falls back to two bmm, which are counted.
SDPA_GAPS = {
    "gpt2": 3 * 2 * 4 * (8 + 8) * 48 * 48,
    "llama": 3 * 2 * 4 * (12 + 12) * 48 * 48,
    "mistral": 3 * 2 * 4 * (8 + 8) * 48 * 48,
    "mixtral": 3 * 2 * 4 * (8 + 8) * 48 * 48,
    "qwen2": 3 * 2 * 4 * (8 + 8) * 48 * 48,
    "qwen3": 3 * 2 * 4 * (12 + 12) * 48 * 48,
    "qwen3_moe": 3 * 2 * 4 * (8 + 8) * 48 * 48,
    "gemma3": 3 * 2 * 4 * (12 + 12) * 48 * 48,
    "gemma3_text": 3 * 2 * 4 * (12 + 12) * 48 * 48,
    "olmo2": 3 * 2 * 4 * (8 + 8) * 48 * 48,
    "deepseek_v2": 0,
    "deepseek_v3": 0,
    "kimi_k2": 0,
    "starcoder2": 3 * 2 * 4 * (8 + 8) * 48 * 48,
    "apertus1p5_text": 3 * 2 * 4 * (8 + 8) * 48 * 48,
    "exaone": 3 * 2 * 4 * (12 + 12) * 48 * 48,
    "sarvam_mla": 0,
    "sarvam_moe": 3 * 2 * 4 * (12 + 12) * 48 * 48,
}
WITHOUT_SDPA = sorted(MODELS.keys() - SDPA_GAPS.keys())
"""Families whose attention (soft-capped logits, sinks) scaled_dot_product_attention cannot express."""


def planned(spec: ModelSpec, tokens: int = TOKENS) -> int:
    """Return powerplan's FLOPs of one forward pass over `tokens` tokens."""
    accounting = Accounting(spec, FULL)
    flops = (accounting.weight_flops_per_token + accounting.state_flops_per_token(tokens)) * tokens
    assert flops.denominator == 1
    return flops.numerator


def without_windows(spec: ModelSpec) -> ModelSpec:
    def opened(mixer: Any) -> Any:
        return msgspec.structs.replace(mixer, window=None) if isinstance(mixer, Attention) else mixer

    return spec.map_mixers(opened)


def read_spec(read: Read, family: str, settings: Settings) -> ModelSpec:
    return read({"model_type": family} | ({"text_config": settings} if family == "gemma3" else settings)).spec


def build(transformers: Any, family: str, settings: Settings, attention: str, experts: str | None = None) -> Any:
    require(transformers, CLASSES.get(family, family))
    config = transformers.AutoConfig.for_model(CLASSES.get(family, family), **settings)
    chosen = {"attn_implementation": attention} | ({"experts_implementation": experts} if experts else {})
    return transformers.AutoModelForCausalLM.from_config(config, **chosen).eval()


def counted(torch: Any, model: Any, mapping: dict[Any, Any] | None = None) -> int:
    """Return the counter's FLOPs of a forward pass of `model`; `mapping` adds formulas for operators it lacks."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(TOKENS)[None]
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(ids, attention_mask=torch.ones_like(ids))
    return int(counter.get_total_flops())


def grouped_mm_flops(rows: Any, experts: Any, *rest: Any, **named: Any) -> int:
    """Rows S x k, sorted by expert, times one k x n matrix of E each: E does not matter."""
    return int(2 * math.prod(rows) * experts[2])


def attention_flops(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    batch, heads, queries, key_dim = query
    return int(2 * batch * heads * queries * key[2] * (key_dim + value[3]))


@pytest.mark.parametrize("family", MODELS)
def test_eager_forward(transformers: Any, torch: Any, read: Read, family: str) -> None:
    spec = read_spec(read, family, MODELS[family])
    model = build(transformers, family, MODELS[family], "eager", "eager" if family in GROUPED_MM_GAPS else None)
    flops = counted(torch, model)
    assert flops == planned(without_windows(spec))
    assert flops - planned(spec) == WINDOW_GAPS.get(family, 0)


@pytest.mark.parametrize("family", GROUPED_MM_GAPS)
def test_experts_as_one_batched_product(transformers: Any, torch: Any, read: Read, family: str) -> None:
    """batched_mm gathers the chosen experts' matrices token by token: the same FLOPs as expert by expert."""
    spec = read_spec(read, family, MODELS[family])
    model = build(transformers, family, MODELS[family], "eager", "batched_mm")
    assert counted(torch, model) == planned(without_windows(spec))


@pytest.mark.parametrize("family", GROUPED_MM_GAPS)
def test_grouped_mm_is_not_counted(transformers: Any, torch: Any, read: Read, family: str) -> None:
    spec = read_spec(read, family, MODELS[family])
    model = build(transformers, family, MODELS[family], "eager")
    assert model.config._experts_implementation == "grouped_mm"
    assert planned(without_windows(spec)) - counted(torch, model) == GROUPED_MM_GAPS[family]
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    assert counted(torch, model, mapping) == planned(without_windows(spec))


@pytest.mark.parametrize("family", SDPA_GAPS)
def test_sdpa_on_cpu_is_not_counted(transformers: Any, torch: Any, read: Read, family: str) -> None:
    spec = read_spec(read, family, MODELS[family])
    model = build(transformers, family, MODELS[family], "sdpa", "eager" if family in GROUPED_MM_GAPS else None)
    assert planned(without_windows(spec)) - counted(torch, model) == SDPA_GAPS[family]
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    assert counted(torch, model, mapping) == planned(without_windows(spec))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "kimi_k2"])
def test_sdpa_takes_mla_whose_keys_are_as_wide_as_values(
    transformers: Any, torch: Any, read: Read, family: str
) -> None:
    settings = MODELS[family] | {"v_head_dim": 12}
    spec = read_spec(read, family, settings)
    model = build(transformers, family, settings, "sdpa", "eager")
    assert planned(spec) - counted(torch, model) == 3 * 2 * 4 * (12 + 12) * 48 * 48


@pytest.mark.parametrize("family", WITHOUT_SDPA)
def test_families_without_sdpa(transformers: Any, family: str) -> None:
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        build(transformers, family, MODELS[family], "sdpa")


PUBLISHED: dict[str, Settings] = {
    "gpt2": {"vocab_size": 50_257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    "llama": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3_moe": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 1536,
    },
    "deepseek_v3": {
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
    },
}
"""GPT-2, Llama 3 8B, Qwen3-235B-A22B and DeepSeek-V3; what is left out is the family's default."""


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_sizes_on_the_meta_device(transformers: Any, torch: Any, read: Read, family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tokens = 1024
    spec = read_spec(read, family, PUBLISHED[family])
    with torch.device("meta"):
        experts = "batched_mm" if family in GROUPED_MM_GAPS else None
        model = build(transformers, family, PUBLISHED[family], "eager", experts)
        ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
        # transformers looks at the values of ids and positions to make a mask, and meta tensors have none.
        mask = torch.zeros(1, 1, tokens, tokens)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    assert counter.get_total_flops() == planned(spec, tokens)
