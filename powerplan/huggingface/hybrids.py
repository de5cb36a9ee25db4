"""Families that mix softmax or latent attention with linear attention, layer by layer."""

from __future__ import annotations

from msgspec.structs import replace

from powerplan.extras import Extra
from powerplan.ffn import MLP, MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.dense import layered
from powerplan.huggingface.experts import Experts, Grouped, listed, routed_experts, sparse_layers
from powerplan.huggingface.latent import MLA_KEYS
from powerplan.huggingface.parts import FULL, LINEAR, SLIDING
from powerplan.mixers import KDA, AnyMixer, Attention, GatedDeltaNet, Lightning, ShortConvolution
from powerplan.part import MAX_SIZE, MAX_WIDTH
from powerplan.spec import Layer, ModelSpec, Norm

ROUTED, SHARED = ("num_experts", "num_local_experts"), ("num_shared_experts", "n_shared_experts")
"""Keys of how many experts Kimi Linear has: both spellings, its own first."""


def kimi_linear(config: Config, name: str) -> ModelSpec:
    """Kimi Linear: KDA, and MLA without positions; layers are numbered from 1 in linear_attn_config.

    head_dim of the published file is a legacy value that no code reads. Expert and router keys have two spellings. The
    router's correction bias is stored and counted, as DeepSeek-V3's is.

    Kimi K3 adds four keys: mla_use_output_gate, use_full_rank_gate for the output gate of KDA, experts that work on
    routed_expert_hidden_size features (latent_moe_use_norm: with a norm of them), and attn_res_block_size, whose
    vectors are not counted.
    """
    count = config.layer_count
    linear = config.nested("linear_attn_config")
    types = parts.layer_types(config, _kimi_types(config, linear, count), (FULL, LINEAR))
    dim = _kimi_size(config, linear, "linear_head_dim", "head_dim")
    kda = KDA(
        heads=_kimi_size(config, linear, "linear_num_heads", "num_heads"),
        head_dim=dim,
        gate_rank=dim,
        conv_size=_kimi_size(config, linear, "linear_conv_kernel_dim", "short_conv_kernel_size", high=MAX_WIDTH),
        full_rank="gate" if (linear or config).boolean("use_full_rank_gate", False) else "none",
    )
    latent = replace(parts.mla(config), output_gate=config.boolean("mla_use_output_gate", False))
    dense = Layer(ffn=MLP(intermediate_size=config.integer("intermediate_size")))
    moe = replace(
        routed_experts(config, ROUTED, SHARED, router_bias=True),
        latent_size=config.optional_integer("routed_expert_hidden_size"),
    )
    norm = moe.latent_size if config.boolean("latent_moe_use_norm", False) else None
    sparse = Layer(ffn=moe, extras=(Extra(name="latent norm", elements=norm),) if norm else ())
    if config.optional_integer("attn_res_block_size"):
        config.note("attention over residuals (attn_res_block_size) has a few vectors in each layer; not counted")
    layers = [
        replace(sparse if has_experts else dense, mixer=latent if layer_type == FULL else kda)
        for layer_type, has_experts in zip(types, sparse_layers(config), strict=True)
    ]
    return parts.assemble(config, name, layers, ties=False)


def _kimi_size(config: Config, linear: Config | None, name: str, within: str, high: int = MAX_SIZE) -> int:
    """Return a size of KDA: `within` linear_attn_config, else the file's `name`, as transformers has it."""
    size = config.integer(name, high=high)
    return linear.integer(within, high=high) if linear is not None and linear.has(within) else size


def _kimi_types(config: Config, linear: Config | None, count: int) -> list[str]:
    full = linear.integers("full_attn_layers") if linear else []
    kda = linear.integers("kda_layers") if linear else []
    if linear is None or not (full or kda):
        return [FULL if index and index % 4 == 0 else LINEAR for index in range(count)]
    if sorted((*full, *kda)) != list(range(1, count + 1)):
        field = "full_attn_layers" if full else "kda_layers"
        raise linear.error(f"full_attn_layers and kda_layers must name each of layers 1 to {count} once", field)
    return [FULL if index + 1 in set(full) else LINEAR for index in range(count)]


def gated_delta_net(config: Config) -> GatedDeltaNet:
    """Return gated DeltaNet of the keys linear_num_value_heads, linear_key_head_dim ..."""
    values = config.integer("linear_num_value_heads", default=32)
    keys = config.integer("linear_num_key_heads", default=16)
    config.check_divides("linear_num_key_heads", keys, "linear_num_value_heads", values)
    return GatedDeltaNet(
        heads=values,
        key_heads=keys,
        head_dim=config.integer("linear_key_head_dim", default=128),
        v_head_dim=config.integer("linear_value_head_dim", default=128),
        conv_size=config.integer("linear_conv_kernel_dim", default=4, high=MAX_WIDTH),
    )


def _qwen_mixers(config: Config) -> list[AnyMixer]:
    """Return gated DeltaNet, and gated attention in every fourth layer or where layer_types says so."""
    interval = config.integer("full_attention_interval", default=4)
    default = [LINEAR if (index + 1) % interval else FULL for index in range(config.layer_count)]
    types = parts.layer_types(config, default, (FULL, LINEAR))
    delta, bias = gated_delta_net(config), config.boolean("attention_bias", False)
    gate = config.boolean("attn_output_gate", True)
    attention = parts.attention(config, bias=bias, qk_norm="head", output_gate=gate)
    return [attention if layer_type == FULL else delta for layer_type in types]


def qwen3_next(config: Config, name: str) -> ModelSpec:
    """Qwen3-Next, Qwen3.5 MoE: gated DeltaNet, every fourth layer gated attention; experts with a gated shared one."""
    parts.note_prediction_layers(config, "mtp_num_hidden_layers")
    if config.family == "qwen3_5_moe_text":  # transformers' code knows no layers without experts
        config.refuse("mlp_only_layers", "every layer of qwen3_5_moe has experts")
        if config.integer("decoder_sparse_step", default=1) != 1:
            config.refuse("decoder_sparse_step", "every layer of qwen3_5_moe has experts")
    return parts.assemble(config, name, parts.qwen_layers(config, _qwen_mixers(config)))


def qwen3_5(config: Config, name: str) -> ModelSpec:
    """Qwen3.5: as Qwen3-Next, with a dense MLP in every layer."""
    parts.note_prediction_layers(config, "mtp_num_hidden_layers")
    return layered(config, name, _qwen_mixers(config))


def olmo_hybrid(config: Config, name: str) -> ModelSpec:
    """OLMo Hybrid: gated DeltaNet, every fourth layer attention as OLMo 3 has it; a dense MLP in every layer."""
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    keys = config.optional_integer("linear_num_key_heads") or heads
    dim = config.optional_integer("linear_key_head_dim") or int(0.75 * hidden / keys)
    sizes = {"linear_num_key_heads": keys, "linear_num_value_heads": heads, "linear_key_head_dim": dim}
    config.defaults = {**config.defaults, **sizes, "linear_value_head_dim": 2 * dim}
    default = [FULL if index % 4 == 3 else LINEAR for index in range(config.layer_count)]
    if FULL not in default:
        default[-1] = FULL
    types = parts.layer_types(config, default, (FULL, LINEAR))
    delta = gated_delta_net(config)
    attention = parts.attention(config, bias=config.boolean("attention_bias", False), qk_norm="full")
    return layered(config, name, [attention if layer_type == FULL else delta for layer_type in types])


def minimax(config: Config, name: str) -> ModelSpec:
    """MiniMax-Text-01 and M1: lightning attention, softmax attention in the layers that say so; all experts.

    transformers' files (minimax) have layer_types; the original ones (minimax_text_01, minimax_m1) attn_type_list, with
    1 for softmax attention, and name each key of transformers' alike.
    """
    config.refuse("shared_intermediate_size", "no published MiniMax has a shared expert")
    count = config.layer_count
    default = [LINEAR if index % 2 else FULL for index in range(count)]
    if config.integers("attn_type_list"):
        default = [FULL if softmax else LINEAR for softmax in listed(config, "attn_type_list", count)]
    elif config.family != "minimax":
        raise config.error(f"{config.family} needs attn_type_list, and the file has none")
    types = parts.layer_types(config, default, (FULL, LINEAR))
    attention = parts.attention(config)
    chunk_size = config.integer("block_size", default=256)
    lightning = Lightning(heads=attention.heads, head_dim=attention.head_dim, chunk_size=chunk_size)
    moe = parts.local_experts(config)
    layers = [Layer(mixer=attention if layer_type == FULL else lightning, ffn=moe) for layer_type in types]
    return parts.assemble(config, name, layers)


LARA = (LINEAR, SLIDING, LINEAR, FULL, SLIDING)


def lara_mini(config: Config, name: str) -> ModelSpec:
    """Lara 4 Mini: gated DeltaNet in two layers of five, a window in two, full attention without positions in one.

    Every layer has experts and a shared one, which has no gate.
    """
    default = [LARA[index % len(LARA)] for index in range(config.layer_count)]
    types = parts.layer_types(config, default, (LINEAR, SLIDING, FULL))
    attention = parts.attention(config, bias=config.boolean("attention_bias", False), qk_norm="head")
    sliding = replace(attention, window=config.integer("sliding_window"))
    kinds: dict[str, AnyMixer] = {LINEAR: gated_delta_net(config), SLIDING: sliding, FULL: attention}
    read = Grouped(Experts(shared_width="shared_expert_intermediate_size"))
    return read.model(config, name, [kinds[layer_type] for layer_type in types])


CONV = "conv"


def _lfm_mixers(config: Config, default: list[str], attention: Attention) -> list[AnyMixer]:
    """Return short convolutions, and attention where layer_types says so; a window in its sliding layers."""
    bias = config.boolean("conv_bias", False)
    hidden, width = config.integer("hidden_size"), config.integer("conv_L_cache", default=3, high=MAX_WIDTH)
    convolution = ShortConvolution(inner_size=hidden, conv_size=width, bias=bias)
    types = parts.layer_types(config, default, (CONV, FULL, SLIDING))
    window = config.optional_integer("sliding_window")
    if window is None and SLIDING in types:
        raise config.error(f"layer {types.index(SLIDING)} is sliding_attention, and there is no sliding_window")
    kinds: dict[str, AnyMixer] = {CONV: convolution, FULL: attention, SLIDING: replace(attention, window=window)}
    return [kinds[layer_type] for layer_type in types]


def _lfm_width(config: Config) -> int:
    """Return the width of LFM2's MLP: two thirds of the stated one, times a factor, up to a multiple."""
    width = config.optional_integer("block_ff_dim") or config.integer("intermediate_size")
    if not config.boolean("block_auto_adjust_ff_dim", False):
        return width
    multiple, factor = config.integer("block_multiple_of"), config.value("block_ffn_dim_multiplier")
    width = int(2 * width / 3)
    return width if factor is None else -(-int(factor * width) // multiple) * multiple


def lfm2(config: Config, name: str) -> ModelSpec:
    """LFM2: gated short convolutions, and attention with qk-norm in the layers of full_attn_idxs; a dense MLP, tied."""
    count = config.layer_count
    stated = config.integers("full_attn_idxs") if config.has("full_attn_idxs") else range(count)
    default = [FULL if index in set(stated) else CONV for index in range(count)]
    mixers = _lfm_mixers(config, default, parts.attention(config, qk_norm="head"))
    tied = config.boolean("tie_embedding", config.boolean("tie_word_embeddings", True))
    mlp = MLP(intermediate_size=_lfm_width(config))
    spec = parts.assemble(config, name, [Layer(mixer=mixer, ffn=mlp) for mixer in mixers])
    return replace(spec, tie_embeddings=tied)


def lfm2_moe(config: Config, name: str) -> ModelSpec:
    """LFM2 MoE: as LFM2, num_dense_layers with an MLP, then experts. expert_bias is stored, one per expert."""
    if config.strings("layer_types") is None:
        raise config.error("lfm2_moe needs layer_types, and the file has none")
    mixers = _lfm_mixers(config, [CONV] * config.layer_count, parts.attention(config, qk_norm="head"))
    experts = config.integer("num_experts")
    moe = MoE(
        experts=experts,
        top_k=parts.experts_chosen(config, experts),
        intermediate_size=config.integer("moe_intermediate_size"),
        router_bias=config.boolean("use_expert_bias", True),
    )
    dense = MLP(intermediate_size=config.integer("intermediate_size"))
    first = config.integer("num_dense_layers", low=0)
    layers = [Layer(mixer=mixer, ffn=moe if index >= first else dense) for index, mixer in enumerate(mixers)]
    return parts.assemble(config, name, layers)


def lfm3(config: Config, name: str) -> ModelSpec:
    """LFM3: LFM2 with gated attention, every other one in a window, and four norms in a layer."""
    kinds = {2: FULL, 0: SLIDING}
    default = [kinds.get(index % 4, CONV) if index else CONV for index in range(config.layer_count)]
    gate = "head" if config.boolean("use_attention_gate", True) else False
    bias = config.boolean("attention_bias", False)
    mixers = _lfm_mixers(config, default, parts.attention(config, qk_norm="head", output_gate=gate, bias=bias))
    return layered(config, name, mixers, norm=Norm(per_layer=4 if config.boolean("use_sandwich_norm", True) else 2))


LATENT = MLA_KEYS | {"mla_use_nope"}
"""Keys of files with latent attention that change no count."""

MINIMAX = frozenset(
    f"layernorm_{part}_{factor}"
    for part in ("full_attention", "linear_attention", "mlp")
    for factor in ("alpha", "beta")
) | {"postnorm", "shared_moe_mode"}
"""Keys of MiniMax's own files: scales of residuals, which of two inputs is the residual, and a mode of shared experts
that no published model has."""

FAMILIES: dict[str, Family] = {
    "kimi_linear": Family(kimi_linear, inert=LATENT),
    "lara_mini": Family(lara_mini),
    "lfm2": Family(lfm2),
    "lfm2_moe": Family(lfm2_moe),
    "lfm3": Family(lfm3),
    "minimax": Family(minimax, inert=MINIMAX),
    "minimax_m1": Family(minimax, like="minimax", inert=MINIMAX),
    "minimax_text_01": Family(minimax, like="minimax", inert=MINIMAX),
    "olmo_hybrid": Family(olmo_hybrid),
    "qwen3_5_moe_text": Family(qwen3_next),
    "qwen3_5_text": Family(qwen3_5),
    "qwen3_next": Family(qwen3_next, inert=frozenset({"intermediate_size"})),
}
"""Reader by model_type."""
