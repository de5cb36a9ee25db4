"""The kinds of mixers; one small mixer of every kind and choice that powerplan.models builds; models of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from powerplan.errors import InputError
from powerplan.ffn import MLP, MoE
from powerplan.mixers import (
    DSA,
    GLA,
    GSA,
    KDA,
    MLA,
    NSA,
    RWKV7,
    Attention,
    DeltaNet,
    Forgetting,
    GatedDeltaNet,
    Lightning,
    Linear,
    LogLinear,
    Mamba1,
    Mamba2,
    Mixer,
    MoBA,
    Power,
    RetNet,
    SparseStateExpansion,
)
from powerplan.mixers.block import Block
from powerplan.spec import LayerGroup, ModelSpec

AnyBlock = TypeVar("AnyBlock", bound=Block)

KINDS = (
    "attention",
    "mla",
    "power",
    "linear",
    "retnet",
    "lightning",
    "gla",
    "deltanet",
    "gated_deltanet",
    "kda",
    "mamba1",
    "mamba2",
    "log_linear",
    "rwkv7",
    "gsa",
    "sse",
    "nsa",
    "moba",
    "dsa",
    "forgetting",
    "chunked_attention",
    "short_conv",
    "mlstm",
    "rglru",
    "rwkv4",
    "indexed_blocks",
    "compressed",
    "hyena",
    "exponential_sparse",
    "span_search",
    "memory_sparse",
    "wersa",
)
"""Every kind that powerplan counts, in the order of the registry: the only list in the tests that a new kind joins."""

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
    "mamba1": Mamba1(inner_size=12, dt_rank=3, state_dim=4),
    "mamba1, norms, biases": Mamba1(inner_size=12, dt_rank=2, state_dim=3, conv_size=0, bias=True, inner_norms=True),
    "mamba2": Mamba2(heads=2, head_dim=6, state_dim=5, chunk_size=8),
    "mamba2, groups, biases": Mamba2(
        heads=6, head_dim=2, state_dim=5, groups=3, conv_size=2, conv_bias=False, bias=True, chunk_size=20
    ),
    "mamba2, bare": Mamba2(heads=4, head_dim=3, state_dim=5, groups=2, conv_size=0, gated_norm=False, chunk_size=16),
    "rwkv7": RWKV7(heads=2, head_dim=8, v_head_dim=5, decay_rank=3, rate_rank=2, gate_rank=4, chunk_size=8),
    "rwkv7, values": RWKV7(
        heads=4, head_dim=4, decay_rank=3, rate_rank=2, gate_rank=4, value_rank=3, channel_mix=False, chunk_size=20
    ),
    "log_linear": LogLinear(heads=2, head_dim=6, state_dim=5, chunk_size=8, max_levels=9),
    "log_linear, groups, biases": LogLinear(
        heads=4,
        head_dim=3,
        state_dim=5,
        groups=2,
        bias=True,
        conv_size=0,
        gated_norm=False,
        chunk_size=32,
        max_levels=9,
    ),
    "gsa": GSA(**STATES, slots=3),
    "gsa, convolution": GSA(**STATES | {"chunk_size": 20}, slots=7, conv_size=3, output_gate=True, output_norm="head"),
    "sse": SparseStateExpansion(**STATES, partitions=3, gate_rank=3),
    "sse, convolution": SparseStateExpansion(
        **STATES | {"chunk_size": 20}, partitions=4, top_k=2, conv_size=3, conv_bias=True, gate_rank=2
    ),
    "forgetting": Forgetting(**HEADS),
    "forgetting, window": Forgetting(**HEADS, window=7, bias=True, qk_norm="head", output_gate=True),
    "moba": MoBA(**HEADS, block_size=4, top_k=3),
    "moba, norms": MoBA(**HEADS, block_size=6, top_k=1, bias="qkv", qk_norm="full", output_norm=True),
    "nsa": NSA(**HEADS, compress_size=4, compress_stride=2, select_size=4, select_count=3, window=7),
    "nsa, odd sizes": NSA(
        **HEADS,
        compress_size=5,
        compress_stride=3,
        select_size=4,
        select_count=5,
        window=2,
        bias=True,
        output_gate=True,
    ),
    "dsa": DSA(**LATENT, q_lora_rank=8, index_heads=2, index_head_dim=6, top_k=9),
    "dsa, all keys": DSA(**LATENT, q_lora_rank=7, index_heads=3, index_head_dim=3, top_k=500, bias=True),
}

EXPERTS = MoE(experts=5, top_k=2, intermediate_size=8)
SHARED = MoE(
    experts=4, top_k=3, intermediate_size=6, shared_intermediate_size=7, bias=True, router_bias=True, shared_gate=True
)


def spec_of(mixer: Any, ffn: Any = None, *, repeat: int = 1, **fields: Any) -> ModelSpec:
    """Return a model of `repeat` layers of `mixer`, with an MLP of 24 where no FFN is given."""
    group = LayerGroup(repeat=repeat, mixer=mixer, ffn=ffn or MLP(intermediate_size=24))
    return ModelSpec(**{"name": "x", "vocab_size": 9, "hidden_size": 16, "layers": (group,), **fields})


def choices(hint: Any) -> list[Any]:
    """Return what a field may be, as far as formulas depend on it: flags, words, nothing, any one number."""
    if hint is bool:
        return [False, True]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    members = get_args(hint)
    if members and hasattr(hint, "__metadata__"):
        return choices(members[0])
    if members:
        return [value for member in members for value in choices(member)]
    return [None] if hint is NoneType else [2]


def variants(block: type[AnyBlock]) -> Iterator[AnyBlock]:
    """Yield the kind with every combination of its choices, but for those that contradict each other."""
    hints = get_type_hints(block, include_extras=True)
    for values in product(*(choices(hints[name]) for name in block.__struct_fields__)):
        with suppress(InputError):
            yield block(**dict(zip(block.__struct_fields__, values, strict=True)))
