"""What a token adds to the caches of transformers' models with sparse attention, against the state that is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hf_decoders import mixers_by_layer

from powerplan.load import LoadedModel

pytestmark = pytest.mark.transformers

Read = Callable[[dict[str, Any]], LoadedModel]


def kept(layer: Any) -> int:
    """The elements that a layer of the cache keeps; keys that are the values, too, count once, if kept twice or not."""
    shared = layer.values.shape == layer.keys.shape and bool((layer.values == layer.keys).all())
    found = [layer.keys] if shared else [layer.keys, layer.values]
    for name in ("compressed_kv", "buffer_kv", "buffer_gate", "overlap_kv", "overlap_gate"):
        found += [tensor for tensor in getattr(layer, name, {}).values() if tensor is not None]
    found += [tensor for name in ("indexer_keys", "idx_keys") if (tensor := getattr(layer, name, None)) is not None]
    return sum(tensor.numel() for tensor in found)


def caches(transformers: Any, torch: Any, read: Read, config: Any, tokens: int) -> list[tuple[int, int]]:
    """Return the elements of each layer's cache after `tokens` tokens: as transformers keeps them, and as counted."""
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    model = model_class(config).eval()
    with torch.no_grad():
        out = model(torch.arange(tokens)[None] % 31, use_cache=True)
    cache = out["cache"] if "cache" in out else out["past_key_values"]  # The latter is its name before 5.24.
    spec = read(json.loads(config.to_json_string(use_diff=False))).spec
    mixers = mixers_by_layer(spec)
    pairs = zip(cache.layers, mixers, strict=True)
    return [(kept(layer), mixer.state_size(tokens).elements) for layer, mixer in pairs]


SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "attn_implementation": "eager",
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 3,
}


@pytest.mark.parametrize("tokens", [3, 11, 22])
def test_deepseek_v4(transformers: Any, torch: Any, read: Read, tokens: int) -> None:
    """transformers keeps one key of the window less, as the next token brings its own."""
    config = transformers.DeepseekV4Config(
        **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
        head_dim=8,
        q_lora_rank=8,
        o_groups=2,
        o_lora_rank=4,
        n_routed_experts=4,
        sliding_window=7,
        index_n_heads=2,
        index_head_dim=4,
        index_topk=2,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 3, "heavily_compressed_attention": 5},
        partial_rotary_factor=0.5,
    )
    missing = 8 if tokens >= 7 else 0
    for found, counted in caches(transformers, torch, read, config, tokens):
        assert counted == found + missing


@pytest.mark.parametrize("tokens", [3, 11])
def test_glm_moe_dsa(transformers: Any, torch: Any, read: Read, tokens: int) -> None:
    """A layer that takes the keys that an earlier one picked keeps no keys of an indexer."""
    types = {"indexer_types": ["full", "shared", "full"], "num_key_value_heads": 4}
    config = transformers.GlmMoeDsaConfig(**SIZES, **LATENT, **types)
    for found, counted in caches(transformers, torch, read, config, tokens):
        assert counted == found


@pytest.mark.parametrize("tokens", [3, 11])
def test_minimax_m3(transformers: Any, torch: Any, read: Read, tokens: int) -> None:
    config = transformers.MiniMaxM3VLTextConfig(
        **{key: value for key, value in SIZES.items() if key != "moe_intermediate_size"},
        num_key_value_heads=2,
        num_local_experts=4,
        head_dim=8,
        rotary_dim=4,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    )
    for found, counted in caches(transformers, torch, read, config, tokens):
        assert counted == found
