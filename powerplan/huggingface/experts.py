"""Families with mixtures of experts, with grouped-query or multi-head latent attention."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import asdict

from powerplan.ffn import MLP, AnyFFN, MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.dense import qwen_windows
from powerplan.mixers import DSA, MLA, AnyMixer
from powerplan.spec import Layer, ModelSpec


def mixtral(config: Config, name: str) -> ModelSpec:
    """Mixtral: experts in every layer; a window in every layer if there is one."""
    mixers = parts.attention_layers(config, parts.one_window(config))
    moe = parts.local_experts(config)
    return parts.assemble(config, name, [Layer(mixer=mixer, ffn=moe) for mixer in mixers])


def qwen3_moe(config: Config, name: str) -> ModelSpec:
    """Qwen 3 MoE: dense MLPs in mlp_only_layers and where decoder_sparse_step skips; qk-norm per head.

    transformers applies an active window to every layer; a file that states max_window_layers means those from
    there on, as in the dense Qwen families.
    """
    windows = qwen_windows(config)
    if None in windows and any(windows):
        config.note("windows as in max_window_layers or layer_types; transformers' qwen3_moe code looks at neither")
    bias = config.boolean("attention_bias", False)
    mixers = parts.attention_layers(config, windows, bias=bias, qk_norm="head")
    return parts.assemble(config, name, parts.qwen_layers(config, mixers))


def gpt_oss(config: Config, name: str) -> ModelSpec:
    """gpt-oss: windows in every other layer from the first on, sinks, biases on projections, experts and router."""
    if "head_dim" in config.data:  # null means hidden_size / num_attention_heads, and not the family's default
        config.defaults = {key: value for key, value in config.defaults.items() if key != "head_dim"}
    windows, bias = parts.alternating_windows(config, period=2), config.boolean("attention_bias", True)
    mixers = parts.attention_layers(config, windows, bias=bias, sinks=True)
    moe = parts.local_experts(config, bias=True)
    return parts.assemble(config, name, [Layer(mixer=mixer, ffn=moe) for mixer in mixers])


def deepseek_v2(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V2 and V2-Lite: MLA, the first layers dense, then experts."""
    config.refuse("mlp_bias", "no published DeepSeek has it")
    return _deepseek(config, name, _mla(config), router_bias=False)


def deepseek_v3(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V3, R1 and Kimi K2: MLA, the first layers dense, then experts.

    The router's correction bias (e_score_correction_bias, one per expert) is stored with the weights and counts as a
    parameter, as in DeepSeek's own code; transformers holds the same tensor as a buffer.
    """
    corrected = (config.data.get("topk_method") or "noaux_tc") == "noaux_tc"
    return _deepseek(config, name, _mla(config), router_bias=corrected)


def deepseek_v32(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V3.2: DeepSeek-V3 with an indexer that picks the keys of every layer (DSA)."""
    mla = _mla(config)
    if mla.q_lora_rank is None:
        raise config.error("q_lora_rank is null, and the indexer's queries come from the query latent", "q_lora_rank")
    indexed = DSA(
        **asdict(mla),
        index_heads=config.integer("index_n_heads", default=64),
        index_head_dim=config.integer("index_head_dim", default=128),
        top_k=config.integer("index_topk", default=2048),
    )
    return _deepseek(config, name, indexed, router_bias=True)


def _mla(config: Config) -> MLA:
    for key in ("index_topk", "index_n_heads") if config.family != "deepseek_v32" else ():
        config.refuse(key, "sparse attention with an indexer (DeepSeek-V3.2) is not MLA alone")
    parts.note_prediction_layers(config, "num_nextn_predict_layers", "num_mtp_layers")
    return parts.mla(config)


def _deepseek(config: Config, name: str, mixer: AnyMixer, router_bias: bool) -> ModelSpec:
    dense = MLP(intermediate_size=config.integer("intermediate_size"))
    sparse = sparse_layers(config)
    moe: AnyFFN = dense
    if config.data.get("n_routed_experts", 0) is not None:  # null means that all layers are dense
        moe = routed_experts(config, ("n_routed_experts", "num_local_experts"), ("n_shared_experts",), router_bias)
    layers = [Layer(mixer=mixer, ffn=moe if has_experts else dense) for has_experts in sparse]
    return parts.assemble(config, name, layers)


def routed_experts(config: Config, routed: Sequence[str], shared: Sequence[str], router_bias: bool) -> MoE:
    """Return the experts of DeepSeek and Kimi Linear, counted by the keys named `routed` and `shared`."""
    experts = config.integer(*routed)
    width = config.integer("moe_intermediate_size")
    shared_count = config.optional_integer(*shared, low=0) or 0
    return MoE(
        experts=experts,
        top_k=parts.experts_chosen(config, experts),
        intermediate_size=width,
        shared_intermediate_size=shared_count * width,
        router_bias=router_bias,
    )


def sparse_layers(config: Config) -> list[bool]:
    """Return which layers have experts: mlp_layer_types, or one in moe_layer_freq from first_k_dense_replace on."""
    count = config.layer_count
    types = (
        config.strings("mlp_layer_types")
        if config.family in ("bailing_hybrid", "deepseek_v32", "kimi_linear")
        else None
    )
    if types is None:
        first = config.integer("first_k_dense_replace", low=0)
        step = config.integer("moe_layer_freq", default=1)
        return [index >= first and index % step == 0 for index in range(count)]
    if len(types) != count or set(types) - {"dense", "sparse"}:
        raise config.error(f"mlp_layer_types must say dense or sparse for each of {count} layers", "mlp_layer_types")
    return [layer_type == "sparse" for layer_type in types]


MLA_KEYS = frozenset({"head_dim", "qk_head_dim", "num_key_value_heads"})
"""Keys of files with latent attention that no code reads: the head dims are in other keys, and heads share no keys."""

FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(deepseek_v2, inert=MLA_KEYS),
    "deepseek_v3": Family(deepseek_v3, inert=MLA_KEYS),
    "deepseek_v32": Family(deepseek_v32, inert=MLA_KEYS | {"layer_types"}),
    "gpt_oss": Family(gpt_oss),
    "kimi_k2": Family(deepseek_v3, like="deepseek_v3", inert=MLA_KEYS),
    "mixtral": Family(mixtral),
    "qwen3_moe": Family(qwen3_moe, defaults={"max_window_layers": 0}, inert=frozenset({"intermediate_size"})),
}
"""Reader by model_type."""
