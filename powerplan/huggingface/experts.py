"""Families with mixtures of experts, with grouped-query or multi-head latent attention."""

from __future__ import annotations

import msgspec

from powerplan.ffn import MLP, MoE
from powerplan.huggingface.config import Config
from powerplan.huggingface.dense import qwen_windows
from powerplan.huggingface.parts import (
    FULL,
    SLIDING,
    alternating,
    assemble,
    attention_layers,
    experts_chosen,
    local_experts,
    mla,
    note_prediction_layers,
    one_window,
    qwen_layers,
    windows_of,
)
from powerplan.mixers import DSA, MLA
from powerplan.spec import Layer, ModelSpec, Norm


def mixtral(config: Config, name: str) -> ModelSpec:
    """Mixtral: experts in every layer; a window in every layer if there is one."""
    window = config.optional_integer("sliding_window")
    mixers = attention_layers(config, one_window(config, window), default_kv_heads=8)
    moe = local_experts(config, 8, 2)
    return assemble(config, name, [Layer(mixer=mixer, ffn=moe) for mixer in mixers], Norm(), tie=False)


def qwen3_moe(config: Config, name: str) -> ModelSpec:
    """Qwen 3 MoE: dense MLPs in mlp_only_layers and where decoder_sparse_step skips; qk-norm per head.

    transformers applies an active window to every layer; a file that states max_window_layers means those from
    there on, as in the dense Qwen families.
    """
    if config.has("max_window_layers") or config.has("layer_types"):
        windows = qwen_windows(config)
        if None in windows and any(windows):
            config.note("windows as in max_window_layers or layer_types; transformers' qwen3_moe code looks at neither")
    else:
        window = config.optional_integer("sliding_window", absent=4096)
        sliding = config.boolean("use_sliding_window", False) and window is not None
        windows = windows_of(config, window, [SLIDING if sliding else FULL] * config.layer_count)
    bias = config.boolean("attention_bias", False)
    mixers = attention_layers(config, windows, default_kv_heads=4, bias=bias, qk_norm="head")
    layers = qwen_layers(config, mixers, default_experts=128, default_chosen=8, default_width=768)
    return assemble(config, name, layers, Norm(), tie=False)


def gpt_oss(config: Config, name: str) -> ModelSpec:
    """gpt-oss: windows in every other layer from the first on, sinks, biases on projections, experts and router."""
    window = config.optional_integer("sliding_window", absent=128)
    mixers = attention_layers(
        config,
        windows_of(config, window, alternating(config.layer_count, 2)),
        default_kv_heads=8,
        default_head_dim=64 if "head_dim" not in config.data else None,
        bias=config.boolean("attention_bias", True),
        sinks=True,
    )
    moe = local_experts(config, 128, 4, bias=True)
    return assemble(config, name, [Layer(mixer=mixer, ffn=moe) for mixer in mixers], Norm(), tie=False)


def deepseek_v2(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V2 and V2-Lite: MLA, the first layers dense, then experts."""
    config.refuse("mlp_bias", "no published DeepSeek has it")
    return _deepseek(config, name, first_dense=0, experts=64, shared=2, top_k=None, moe_width=1407)


def deepseek_v32(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V3.2: DeepSeek-V3 with an indexer that picks the keys of every layer (DSA)."""
    return _deepseek(config, name, first_dense=3, experts=256, shared=1, top_k=8, moe_width=2048, router_bias=True)


def deepseek_v3(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V3, R1 and Kimi K2: MLA, the first layers dense, then experts.

    The router's correction bias (e_score_correction_bias, one per expert) is stored with the weights and counts as a
    parameter, as in DeepSeek's own code; transformers holds the same tensor as a buffer.
    """
    corrected = (config.data.get("topk_method") or "noaux_tc") == "noaux_tc"
    return _deepseek(config, name, first_dense=3, experts=256, shared=1, top_k=8, moe_width=2048, router_bias=corrected)


def _deepseek(
    config: Config,
    name: str,
    *,
    first_dense: int,
    experts: int,
    shared: int,
    top_k: int | None,
    moe_width: int,
    router_bias: bool = False,
) -> ModelSpec:
    indexed = config.family == "deepseek_v32"
    for key in ("index_topk", "index_n_heads") if not indexed else ():
        config.refuse(key, "sparse attention with an indexer (DeepSeek-V3.2) is not MLA alone")
    note_prediction_layers(config, "num_nextn_predict_layers", "num_mtp_layers")
    mixer = mla(config, default_q_rank=1536)
    if indexed:
        mixer = _with_indexer(config, mixer)
    dense = MLP(intermediate_size=config.integer("intermediate_size"))
    sparse = sparse_layers(config, default_first=first_dense)
    if "n_routed_experts" in config.data and config.data["n_routed_experts"] is None:
        moe = None
    else:
        count = config.integer("n_routed_experts", "num_local_experts", default=experts)
        width = config.integer("moe_intermediate_size", default=moe_width)
        shared_count = config.optional_integer("n_shared_experts", absent=shared, low=0) or 0
        moe = MoE(
            experts=count,
            top_k=experts_chosen(config, count, top_k),
            intermediate_size=width,
            shared_intermediate_size=shared_count * width,
            router_bias=router_bias,
        )
    layers = [
        Layer(mixer=mixer, ffn=dense if moe is None or not sparse[index] else moe)
        for index in range(config.layer_count)
    ]
    return assemble(config, name, layers, Norm(), tie=False)


def _with_indexer(config: Config, mixer: MLA) -> DSA:
    if mixer.q_lora_rank is None:
        raise config.error("q_lora_rank is null, and the indexer's queries come from the query latent", "q_lora_rank")
    return DSA(
        **msgspec.structs.asdict(mixer),
        index_heads=config.integer("index_n_heads", default=64),
        index_head_dim=config.integer("index_head_dim", default=128),
        top_k=config.integer("index_topk", default=2048),
    )


def sparse_layers(config: Config, default_first: int) -> list[bool]:
    """Return which layers have experts: mlp_layer_types, or one in moe_layer_freq from first_k_dense_replace on."""
    count = config.layer_count
    types = config.strings("mlp_layer_types") if config.family in ("deepseek_v32", "kimi_linear") else None
    if types is None:
        first = config.integer("first_k_dense_replace", default=default_first, low=0)
        step = config.integer("moe_layer_freq", default=1)
        return [index >= first and index % step == 0 for index in range(count)]
    if len(types) != count or set(types) - {"dense", "sparse"}:
        raise config.error(f"mlp_layer_types must say dense or sparse for each of {count} layers", "mlp_layer_types")
    return [layer_type == "sparse" for layer_type in types]
