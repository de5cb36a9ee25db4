"""Ling and Ring (Bailing): grouped-query attention and experts in 1 and 2.0, and what joins linear attention since.

The code of all but 3.0 is beside their weights, and in inclusionAI's repositories; transformers has 3.0.
"""

from __future__ import annotations

from functools import partial

from msgspec.structs import replace

from powerplan.errors import shown
from powerplan.extras import Extra
from powerplan.ffn import MLP, MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family, keys
from powerplan.huggingface.experts import Experts, Grouped, moe_of, routed_experts, sparse_layers
from powerplan.huggingface.latent import MLA_KEYS
from powerplan.huggingface.parts import FULL, LINEAR
from powerplan.mixers import KDA, AnyMixer, Attention, Lightning
from powerplan.part import MAX_WIDTH
from powerplan.spec import Layer, ModelSpec

ROUTED, SHARED = ("num_experts", "num_local_experts"), ("num_shared_experts", "n_shared_experts")

KV_HEADS = "num_kv_heads_for_linear_attn"
FLA_CHUNK = 64
"""Tokens of a chunk of chunk_simple_gla in flash-linear-attention, which the code of Ling and Ring calls."""


def bailing_moe(config: Config, name: str) -> ModelSpec:
    """Ling and Ring (BailingMoe and BailingMoeV2): flags for qk-norm and a router bias.

    use_bias is for all projections but the experts', use_qkv_bias for query, key and value alone.
    """
    attention = _grouped(config, use_qk_norm=False)
    return _experts(config, name, [attention] * config.layer_count, first=0, router_bias=False)


def bailing_moe_linear(config: Config, name: str) -> ModelSpec:
    """Ring-linear 2.0: lightning attention, and grouped-query attention in the last layer of each group.

    Layers beyond the last whole group have grouped-query attention. Ring-mini-linear-2.0 has 16,423,448,320 parameters.
    """
    full, linear = _grouped(config, use_qk_norm=True), _lightning(config)
    types = parts.layer_types(config, _last_of_group(config, rest=FULL), (FULL, LINEAR))
    mixers: list[AnyMixer] = [full if layer_type == FULL else linear for layer_type in types]
    spec = _experts(config, name, mixers, first=1, router_bias=True)
    return _with_norms(config, spec)


def bailing_hybrid(config: Config, name: str) -> ModelSpec:
    """Ling and Ring 2.5, 2.6 and 3.0, which share a model_type: latent attention in the last layer of each group.

    The others have KDA in 3.0, and lightning attention before. Files of 3.0 state short_conv_kernel_size, which KDA
    alone has; those of 2.5 and 2.6 do not, and name the class BailingMoeV2_5ForCausalLM.
    """
    return _v25(config, name) if _is_v25(config) else _v3(config, name)


def _is_v25(config: Config) -> bool:
    architectures = config.data.get("architectures")
    named = isinstance(architectures, list) and "BailingMoeV2_5ForCausalLM" in architectures
    stated = any(config.has(key) for key in ("short_conv_kernel_size", "linear_conv_kernel_dim", "kda_lower_bound"))
    return not stated and (named or config.has("group_norm_size"))


def _v25(config: Config, name: str) -> ModelSpec:
    """Ling and Ring 2.5 and 2.6: as bailing_moe_linear, with latent attention that has no gate."""
    config.defaults = V25 | {"num_mtp_layers": 0}
    for key in ("use_bias", "use_qkv_bias", "attention_bias"):
        config.refuse(key, "no published Ling 2.5 has it")
    latent, linear = parts.mla(config), _lightning(config)
    types = parts.layer_types(config, _last_of_group(config, rest=FULL), (FULL, LINEAR))
    mixers: list[AnyMixer] = [latent if layer_type == FULL else linear for layer_type in types]
    return _with_norms(config, _experts(config, name, mixers, first=1, router_bias=True))


def _v3(config: Config, name: str) -> ModelSpec:
    """Ling 3.0: KDA with full-rank gates, and latent attention with one gate per head."""
    for key, because in V3_REFUSED.items():
        config.refuse(key, because)
    if not config.boolean("no_kda_lora", True):
        raise config.error("no_kda_lora false is not supported: no published Ling 3.0 has it", "no_kda_lora")
    config.word("gated_attention_proj_granularity_type", ("head_wise",))
    if (config.optional_integer("group_norm_size") or 1) != 1:
        raise config.error("group_norm_size is not 1, and KDA has a norm per head", "group_norm_size")
    types = parts.layer_types(config, _last_of_group(config, rest=LINEAR), (FULL, LINEAR))
    heads, dim = config.integer("num_attention_heads"), config.integer("head_dim")
    width = config.integer("short_conv_kernel_size", high=MAX_WIDTH)
    kda = KDA(
        heads=config.optional_integer("linear_num_heads") or heads,
        head_dim=config.optional_integer("linear_head_dim") or dim,
        conv_size=config.optional_integer("linear_conv_kernel_dim", high=MAX_WIDTH) or width,
        full_rank="both",
    )
    latent = replace(parts.mla(config), output_gate="head")
    dense = MLP(intermediate_size=config.integer("intermediate_size"))
    moe = _with_shared_width(config, routed_experts(config, ROUTED, SHARED, router_bias=True))
    parts.note_prediction_layers(config, "num_nextn_predict_layers", "num_mtp_layers")
    layers = [
        Layer(mixer=latent if layer_type == FULL else kda, ffn=moe if has_experts else dense)
        for layer_type, has_experts in zip(types, sparse_layers(config), strict=True)
    ]
    return parts.assemble(config, name, layers, ties=False)


def _grouped(config: Config, *, use_qk_norm: bool) -> Attention:
    """Return the grouped-query attention of Ling and Ring; use_qk_norm: what a file without that flag means."""
    qkv = "qkv" if config.boolean("use_qkv_bias", False) else False
    norm = "head" if config.boolean("use_qk_norm", use_qk_norm) else "none"
    return parts.attention(config, bias=config.boolean("use_bias", False) or qkv, qk_norm=norm)


def _lightning(config: Config) -> Lightning:
    """Return lightning attention of all heads, which share no keys: one norm over them, its weights H v in all groups.

    Its queries and keys are rotated, and have no SiLU unless linear_silu is true; neither changes a count.
    """
    heads = config.integer("num_attention_heads")
    hidden = config.integer("hidden_size")
    dim = config.optional_integer("head_dim") or hidden // heads
    stated = config.optional_integer(KV_HEADS, low=0)
    if stated not in (None, 0, heads):
        problem = f"{KV_HEADS} {shown(stated)} is not num_attention_heads {heads}, and linear attention shares no keys"
        raise config.error(problem, KV_HEADS)
    groups = config.optional_integer("group_norm_size") or 1
    config.check_divides("group_norm_size", groups, "num_attention_heads", heads)
    return Lightning(heads=heads, head_dim=dim, output_norm="full", chunk_size=FLA_CHUNK)


def _with_norms(config: Config, spec: ModelSpec) -> ModelSpec:
    """Return the spec with what lightning attention has here beside MiniMax's: norms of queries and keys, and biases.

    use_qkv_bias is for queries, keys and values, use_bias for the output projection.
    """
    normed = config.boolean("use_qk_norm", True)
    inner, outer = config.boolean("use_qkv_bias", False), config.boolean("use_bias", False)

    def added(layer: Layer) -> Layer:
        mixer = layer.mixer
        if not isinstance(mixer, Lightning):
            return layer
        extras = list(layer.extras)
        if normed:
            extras.append(Extra(name="qk-norm", elements=2 * mixer.head_dim))
        if inner or outer:
            width = 3 * mixer.heads * mixer.head_dim if inner else 0
            extras.append(Extra(name="linear attention biases", vectors=int(outer), elements=width))
        return replace(layer, extras=tuple(extras))

    return spec.map_layers(added)


def _last_of_group(config: Config, *, rest: str) -> list[str]:
    """Return the kinds of layers: full attention in the last of each layer_group_size, `rest` beyond whole groups."""
    count, group = config.layer_count, config.integer("layer_group_size")
    whole = count // group * group
    types = [LINEAR if (index + 1) % group else FULL for index in range(count)]
    return types[:whole] + [rest] * (count - whole)


def _experts(config: Config, name: str, mixers: list[AnyMixer], *, first: int, router_bias: bool) -> ModelSpec:
    """Return the spec of `mixers`, each with a dense MLP or experts.

    first: how many layers are dense where first_k_dense_replace does not say. router_bias: what a file without
    moe_router_enable_expert_bias means.
    """

    def moe(config: Config, keys: Experts) -> MoE:
        shared = config.optional_integer("num_shared_experts", low=0) or 0
        experts = moe_of(config, keys)
        return _with_shared_width(config, replace(experts, shared_intermediate_size=shared * experts.intermediate_size))

    read = Grouped(
        Experts(router_bias=config.boolean("moe_router_enable_expert_bias", router_bias)),
        sparse=partial(sparse_layers, first=first),
        mlp_biased="use_bias",
    )
    return read.model(config, name, mixers, moe)


def _with_shared_width(config: Config, moe: MoE) -> MoE:
    """Return the experts with shared ones of moe_shared_expert_intermediate_size, where that is stated."""
    width = config.optional_integer("moe_shared_expert_intermediate_size")
    if width is None:
        return moe
    return replace(moe, shared_intermediate_size=moe.shared_intermediate_size // moe.intermediate_size * width)


V25 = {
    "head_dim": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 8,
    "layer_group_size": 5,
}
"""Defaults of BailingMoeV2_5Config, but for sizes that every published file states."""

V3_REFUSED = {
    "use_kda_lora": "no published Ling 3.0 has low-rank gates",
    "use_mla_nope": "no published Ling 3.0 has latent attention without positions",
    "use_qkv_bias": "no published Ling 3.0 has it",
    "use_bias": "no published Ling 3.0 has it",
    "use_nGPT": "no published Ling 3.0 has it",
    "up_proj_norm": "no published Ling 3.0 has it",
    "value_norm": "no published Ling 3.0 has it",
}

MOE = keys("max_window_layers use_rmsnorm")
LINEAR_KEYS = MOE | keys(
    "linear_backend linear_rope linear_scale linear_silu num_linear_key_value_heads use_linear_silu"
)
"""Keys of the linear attention that change no count: positions, SiLU, and which kernel computes it."""

HYBRID = (
    MLA_KEYS
    | LINEAR_KEYS
    | keys(
        """
        expert_swiglu_limit_list linear_attention mla_use_nope moe_router_enable_expert_bias mtp_use_kda
        num_kv_heads_for_linear_attn scale_router_input share_expert_swiglu_limit_list use_qk_norm
        """
    )
)
"""Those of Ling 2.5 to 3.0. use_qk_norm stands for norms without weights in KDA; the router always has its bias."""

FAMILIES: dict[str, Family] = {
    "bailing_hybrid": Family(bailing_hybrid, inert=HYBRID),
    "bailing_moe": Family(bailing_moe, inert=MOE),
    "bailing_moe_linear": Family(bailing_moe_linear, inert=LINEAR_KEYS),
    "bailing_moe_v2": Family(bailing_moe, inert=MOE),
}
"""Reader by model_type."""
