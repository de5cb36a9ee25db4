"""Families that mix softmax or latent attention with linear attention, layer by layer."""

from __future__ import annotations

from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.experts import routed_experts, sparse_layers
from powerplan.huggingface.parts import FULL, LINEAR
from powerplan.mixers import KDA, GatedDeltaNet, Lightning
from powerplan.spec import Layer, ModelSpec


def kimi_linear(config: Config, name: str) -> ModelSpec:
    """Kimi Linear: KDA, and MLA without positions; layers are numbered from 1 in linear_attn_config.

    head_dim of the published file is a legacy value that no code reads. Expert and router keys have two spellings. The
    router's correction bias is stored and counted, as DeepSeek-V3's is.
    """
    count = config.layer_count
    linear = config.nested("linear_attn_config")
    types = parts.layer_types(config, _kimi_types(config, linear, count), (FULL, LINEAR))
    heads, head_dim, width = "num_heads", "head_dim", "short_conv_kernel_size"
    if linear is None:
        heads, head_dim, width = "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"
    source = linear or config
    dim = source.integer(head_dim, default=128)
    kda = KDA(
        heads=source.integer(heads, default=32),
        head_dim=dim,
        gate_rank=dim,
        conv_size=source.integer(width, default=4, high=1024),
    )
    latent = parts.mla(config)
    dense = MLP(intermediate_size=config.integer("intermediate_size"))
    routed, shared = ("num_experts", "num_local_experts"), ("num_shared_experts", "n_shared_experts")
    moe = routed_experts(config, routed, shared, router_bias=True)
    layers = [
        Layer(mixer=latent if layer_type == FULL else kda, ffn=moe if has_experts else dense)
        for layer_type, has_experts in zip(types, sparse_layers(config), strict=True)
    ]
    return parts.assemble(config, name, layers, ties=False)


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
    types = parts.layer_types(config, default, (FULL, LINEAR))
    values = config.integer("linear_num_value_heads", default=32)
    keys = config.integer("linear_num_key_heads", default=16)
    config.check_divides("linear_num_key_heads", keys, "linear_num_value_heads", values)
    delta = GatedDeltaNet(
        heads=values,
        key_heads=keys,
        head_dim=config.integer("linear_key_head_dim", default=128),
        v_head_dim=config.integer("linear_value_head_dim", default=128),
        conv_size=config.integer("linear_conv_kernel_dim", default=4, high=1024),
    )
    bias = config.boolean("attention_bias", False)
    attention = parts.attention(config, bias=bias, qk_norm="head", output_gate=True)
    mixers = [attention if layer_type == FULL else delta for layer_type in types]
    return parts.assemble(config, name, parts.qwen_layers(config, mixers))


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
    types = parts.layer_types(config, [FULL if kind else LINEAR for kind in listed] or default, (FULL, LINEAR))
    attention = parts.attention(config)
    chunk_size = config.integer("block_size", default=256)
    lightning = Lightning(heads=attention.heads, head_dim=attention.head_dim, chunk_size=chunk_size)
    moe = parts.local_experts(config)
    layers = [Layer(mixer=attention if layer_type == FULL else lightning, ffn=moe) for layer_type in types]
    return parts.assemble(config, name, layers)


FAMILIES: dict[str, Family] = {
    "kimi_linear": Family(kimi_linear, inert=frozenset({"head_dim", "qk_head_dim", "num_key_value_heads"})),
    "minimax": Family(minimax),
    "minimax_m1": Family(minimax, like="minimax"),
    "minimax_text_01": Family(minimax, like="minimax"),
    "qwen3_next": Family(qwen3_next, inert=frozenset({"intermediate_size"})),
}
"""Reader by model_type."""
