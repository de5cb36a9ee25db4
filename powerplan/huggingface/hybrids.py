"""Families that mix softmax or latent attention with linear attention, layer by layer."""

from __future__ import annotations

from powerplan.ffn import MLP, MoE
from powerplan.huggingface.config import Config
from powerplan.huggingface.experts import sparse_layers
from powerplan.huggingface.parts import (
    FULL,
    LINEAR,
    assemble,
    attention_layers,
    experts_chosen,
    layer_types,
    local_experts,
    mla,
    qwen_layers,
)
from powerplan.mixers import KDA, GatedDeltaNet, Lightning
from powerplan.spec import Layer, ModelSpec, Norm


def kimi_linear(config: Config, name: str) -> ModelSpec:
    """Kimi Linear: KDA, and MLA without positions; layers are numbered from 1 in linear_attn_config.

    head_dim of the published file is a legacy value that no code reads. Expert and router keys have two spellings. The
    router's correction bias is stored and counted, as DeepSeek-V3's is.
    """
    count = config.layer_count
    linear = config.nested("linear_attn_config")
    types = layer_types(config, _kimi_types(config, linear, count), (FULL, LINEAR))
    heads, head_dim, width = "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"
    source = config
    if linear is not None:
        source, heads, head_dim, width = linear, "num_heads", "head_dim", "short_conv_kernel_size"
    dim = source.integer(head_dim, default=128)
    kda = KDA(
        heads=source.integer(heads, default=32),
        head_dim=dim,
        gate_rank=dim,
        conv_size=source.integer(width, default=4, high=1024),
    )
    latent = mla(config, default_q_rank=None)
    dense = MLP(intermediate_size=config.integer("intermediate_size"))
    experts = config.integer("num_experts", "num_local_experts", default=256)
    moe_width = config.integer("moe_intermediate_size", default=1024)
    shared = config.optional_integer("num_shared_experts", "n_shared_experts", absent=1, low=0) or 0
    moe = MoE(
        experts=experts,
        top_k=experts_chosen(config, experts, 8),
        intermediate_size=moe_width,
        shared_intermediate_size=shared * moe_width,
        router_bias=True,
    )
    sparse = sparse_layers(config, default_first=1)
    layers = [
        Layer(mixer=latent if types[index] == FULL else kda, ffn=moe if sparse[index] else dense)
        for index in range(count)
    ]
    return assemble(config, name, layers, Norm(), tie=False)


def _kimi_types(config: Config, linear: Config | None, count: int) -> list[str]:
    full = linear.integers("full_attn_layers") if linear else []
    kda = linear.integers("kda_layers") if linear else []
    if linear is None or not (full or kda):
        return [FULL if index and index % 4 == 0 else LINEAR for index in range(count)]
    if sorted((*full, *kda)) != list(range(1, count + 1)):
        field = "full_attn_layers" if full else "kda_layers"
        raise linear.error(f"full_attn_layers and kda_layers must name each of layers 1 to {count} once", field)
    return [FULL if index + 1 in set(full) else LINEAR for index in range(count)]


def qwen3_next(config: Config, name: str) -> ModelSpec:
    """Qwen3-Next: gated DeltaNet, every fourth layer gated attention; experts with a gated shared one."""
    interval = config.integer("full_attention_interval", default=4)
    default = [LINEAR if (index + 1) % interval else FULL for index in range(config.layer_count)]
    types = layer_types(config, default, (FULL, LINEAR))
    delta = GatedDeltaNet(
        heads=config.integer("linear_num_value_heads", default=32),
        key_heads=_key_heads(config),
        head_dim=config.integer("linear_key_head_dim", default=128),
        v_head_dim=config.integer("linear_value_head_dim", default=128),
        conv_size=config.integer("linear_conv_kernel_dim", default=4, high=1024),
    )
    bias = config.boolean("attention_bias", False)
    (attention,) = attention_layers(
        config, [None], default_kv_heads=2, default_head_dim=256, bias=bias, qk_norm="head", output_gate=True
    )
    mixers = [attention if layer_type == FULL else delta for layer_type in types]
    layers = qwen_layers(config, mixers, default_experts=512, default_chosen=10, default_width=512, default_shared=512)
    return assemble(config, name, layers, Norm(), tie=False)


def _key_heads(config: Config) -> int:
    keys = config.integer("linear_num_key_heads", default=16)
    values = config.integer("linear_num_value_heads", default=32)
    config.check_divides("linear_num_key_heads", keys, "linear_num_value_heads", values)
    return keys


def minimax(config: Config, name: str) -> ModelSpec:
    """MiniMax-Text-01 and M1: lightning attention, softmax attention in the layers that say so; all experts.

    transformers' files (minimax) have layer_types; the original ones (minimax_text_01, minimax_m1) attn_type_list, with
    1 for softmax attention, and name each key of transformers' alike.
    """
    config.refuse("shared_intermediate_size", "no published MiniMax has a shared expert")
    count = config.layer_count
    default = [LINEAR if index % 2 else FULL for index in range(count)]
    listed = config.integers("attn_type_list")
    if config.family != "minimax" and not listed:
        raise config.error(f"{config.family} needs attn_type_list, and the file has none")
    if listed and (len(listed) != count or not set(listed) <= {0, 1}):
        raise config.error(f"attn_type_list must have 0 or 1 for each of {count} layers", "attn_type_list")
    types = layer_types(config, [FULL if kind else LINEAR for kind in listed] or default, (FULL, LINEAR))
    (attention,) = attention_layers(config, [None], default_kv_heads=8)
    lightning = Lightning(
        heads=attention.heads,
        head_dim=attention.head_dim,
        chunk_size=config.integer("block_size", default=256),
    )
    moe = local_experts(config, 8, 2)
    layers = [Layer(mixer=attention if layer_type == FULL else lightning, ffn=moe) for layer_type in types]
    return assemble(config, name, layers, Norm(), tie=False)
