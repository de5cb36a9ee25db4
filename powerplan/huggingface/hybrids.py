"""Families that mix softmax or latent attention with linear attention, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from powerplan.errors import shown
from powerplan.ffn import MLP, MoE
from powerplan.huggingface.config import Config
from powerplan.huggingface.dense import kv_default
from powerplan.huggingface.experts import experts_chosen, sparse_layers
from powerplan.huggingface.parts import assemble, attention_layers
from powerplan.mixers import KDA, MLA, AnyMixer, GatedDeltaNet, Lightning
from powerplan.spec import Layer, ModelSpec, Norm

FULL, LINEAR = "full_attention", "linear_attention"


def layer_types(config: Config, default: Sequence[str]) -> list[str]:
    """Return which layers attend fully and which linearly: layer_types where the file has it, else the default."""
    types = config.words("layer_types")
    if types is None:
        return list(default)
    if len(types) != len(default):
        raise config.error(f"layer_types has {len(types)} entries for {len(default)} layers", "layer_types")
    for index, kind in enumerate(types):
        if kind not in (FULL, LINEAR):
            raise config.error(
                f"layer_types[{index}] {shown(kind)} is not supported for {config.family}", "layer_types", index
            )
    return types


def kimi_linear(config: Config, name: str) -> ModelSpec:
    """Kimi Linear: KDA, and MLA without positions; layers are numbered from 1 in linear_attn_config.

    head_dim of the published file is a legacy value that no code reads. Expert and router keys have two spellings. The
    router's correction bias is stored and counted, as DeepSeek-V3's is.
    """
    count = config.layer_count
    linear = config.nested("linear_attn_config")
    types = layer_types(config, _kimi_types(config, linear, count))
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
    mla = MLA(
        heads=config.integer("num_attention_heads"),
        q_lora_rank=config.optional_integer("q_lora_rank"),
        kv_lora_rank=config.integer("kv_lora_rank", default=512),
        qk_nope_head_dim=config.integer("qk_nope_head_dim", default=128),
        qk_rope_head_dim=config.integer("qk_rope_head_dim", default=64),
        v_head_dim=config.integer("v_head_dim", default=128),
        bias=config.boolean("attention_bias", False),
    )
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
        Layer(mixer=mla if types[index] == FULL else kda, ffn=moe if sparse[index] else dense) for index in range(count)
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
    count = config.layer_count
    types = layer_types(config, [LINEAR if (index + 1) % interval else FULL for index in range(count)])
    delta = GatedDeltaNet(
        heads=config.integer("linear_num_value_heads", default=32),
        key_heads=_divisor(config),
        head_dim=config.integer("linear_key_head_dim", default=128),
        v_head_dim=config.integer("linear_value_head_dim", default=128),
        conv_size=config.integer("linear_conv_kernel_dim", default=4, high=1024),
    )
    (attention,) = attention_layers(
        config,
        [None],
        default_kv_heads=kv_default(config, 2),
        default_head_dim=256,
        bias=config.boolean("attention_bias", False),
        qk_norm="head",
        output_gate=True,
    )
    experts = config.integer("num_experts", "num_local_experts", default=512, low=0)
    dense_layers = set(config.integers("mlp_only_layers"))
    step = config.integer("decoder_sparse_step", default=1)
    layers = []
    for index, kind in enumerate(types):
        mixer: AnyMixer = attention if kind == FULL else delta
        if index in dense_layers or experts == 0 or (index + 1) % step:
            layers.append(Layer(mixer=mixer, ffn=MLP(intermediate_size=config.integer("intermediate_size"))))
            continue
        moe = MoE(
            experts=experts,
            top_k=experts_chosen(config, experts, 10),
            intermediate_size=config.integer("moe_intermediate_size", default=512),
            shared_intermediate_size=config.integer("shared_expert_intermediate_size", default=512),
            shared_gate=True,
        )
        layers.append(Layer(mixer=mixer, ffn=moe))
    return assemble(config, name, layers, Norm(), tie=False)


def _divisor(config: Config) -> int:
    keys = config.integer("linear_num_key_heads", default=16)
    values = config.integer("linear_num_value_heads", default=32)
    if values % keys:
        raise config.error(
            f"linear_num_key_heads {keys} does not divide linear_num_value_heads {values}", "linear_num_key_heads"
        )
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
    types = layer_types(config, [FULL if kind else LINEAR for kind in listed] or default)
    (attention,) = attention_layers(config, [None], default_kv_heads=kv_default(config, 8))
    lightning = Lightning(
        heads=attention.heads,
        head_dim=attention.head_dim,
        chunk_size=config.integer("block_size", default=256),
    )
    experts = config.integer("num_local_experts", "num_experts", default=8)
    moe = MoE(
        experts=experts,
        top_k=experts_chosen(config, experts, 2),
        intermediate_size=config.integer("intermediate_size"),
    )
    layers = [Layer(mixer=attention if kind == FULL else lightning, ffn=moe) for kind in types]
    return assemble(config, name, layers, Norm(), tie=False)
