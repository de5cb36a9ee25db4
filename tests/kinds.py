"""One small mixer of every kind and choice that powerplan.models builds, and one-layer models of them."""

from __future__ import annotations

from typing import Any

from powerplan.ffn import MLP, MoE
from powerplan.mixers import (
    GLA,
    KDA,
    MLA,
    Attention,
    DeltaNet,
    GatedDeltaNet,
    Lightning,
    Linear,
    Mixer,
    Power,
    RetNet,
)
from powerplan.spec import LayerGroup, ModelSpec

HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 6, "v_head_dim": 5}
STATES: dict[str, Any] = {"heads": 2, "head_dim": 6, "v_head_dim": 5, "chunk_size": 8}
LATENT: dict[str, Any] = {
    "heads": 3,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
MIXERS: dict[str, Mixer] = {
    "attention": Attention(**HEADS, bias=True),
    "qk-norm": Attention(**HEADS, qk_norm="head", output_gate=True),
    "full qk-norm": Attention(**HEADS, qk_norm="full"),
    "window": Attention(**HEADS, window=7, bias="qkv"),
    "sinks": Attention(**HEADS, sinks=True),
    "window, sinks": Attention(**HEADS, window=7, sinks=True),
    "mla": MLA(**LATENT),
    "mla, low-rank queries": MLA(**LATENT, q_lora_rank=8, bias=True),
    "power": Power(**HEADS, p=2, gated=True, bias=True),
    "power p=3": Power(**HEADS, p=3, normalize=False, chunk_size=8),
    "linear": Linear(**HEADS, gated=True),
    "retnet": RetNet(**STATES),
    "retnet, convolution": RetNet(**STATES, conv_size=3, conv_bias=True, output_norm="head"),
    "lightning": Lightning(**STATES),
    "gla": GLA(**STATES, gate_rank=3),
    "deltanet": DeltaNet(**STATES),
    "gated_deltanet": GatedDeltaNet(**STATES | {"heads": 4}, key_heads=2),
    "gated_deltanet, bare": GatedDeltaNet(**STATES, conv_size=0, output_norm="none", output_gate=False),
    "kda": KDA(**STATES, gate_rank=3),
    "kda, biases": KDA(**STATES | {"chunk_size": 20}, gate_rank=3, gate_bias=True, conv_bias=True, output_norm="full"),
}

EXPERTS = MoE(experts=5, top_k=2, intermediate_size=8)
SHARED = MoE(
    experts=4, top_k=3, intermediate_size=6, shared_intermediate_size=7, bias=True, router_bias=True, shared_gate=True
)


def spec_of(mixer: Any, ffn: Any = None, *, repeat: int = 1, **fields: Any) -> ModelSpec:
    """Return a model of `repeat` layers of `mixer`, with an MLP of 24 where no FFN is given."""
    group = LayerGroup(repeat=repeat, mixer=mixer, ffn=ffn or MLP(intermediate_size=24))
    return ModelSpec(**{"name": "x", "vocab_size": 9, "hidden_size": 16, "layers": (group,), **fields})
