"""Text decoders that transformers has within wrappers alone, beside towers for images and sound."""

from __future__ import annotations

from functools import partial

from msgspec.structs import replace

from powerplan.errors import shown
from powerplan.extras import Extra
from powerplan.ffn import MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family, keys
from powerplan.huggingface.dense import dense, glm4, hunyuan, layered, llama, qwen2
from powerplan.huggingface.experts import UNUSED_WIDTH, Experts, Grouped, moe_of, qwen3_moe, sparse_layers
from powerplan.huggingface.mixed import gates_without_bias
from powerplan.huggingface.parts import FULL, SLIDING
from powerplan.mixers import Attention
from powerplan.spec import Layer, ModelSpec, Norm


def step(config: Config, name: str) -> ModelSpec:
    """Step 3.5 and 3.7 Flash: sliding layers have more query heads, and each head a gate; experts and a shared one.

    Published files have the heads of sliding layers in attention_other_setting, the layers with experts as text in
    moe_layers_enum, and lists that are longer than the model, for layers that predict further tokens.
    """
    if not config.boolean("use_qk_norm", True):
        raise config.error("use_qk_norm false is not supported: no published Step has it", "use_qk_norm")
    count = config.layer_count
    further = config.optional_integer("num_nextn_predict_layers", "num_mtp_layers", low=0) or 0
    parts.note_prediction_layers(config, "num_nextn_predict_layers", "num_mtp_layers")
    types = config.strings("layer_types") or [FULL] * count
    if len(types) not in (count, count + further):
        raise config.error(f"layer_types has {len(types)} entries for {count} layers", "layer_types")
    types = types[:count]
    for index, layer_type in enumerate(types):
        if layer_type not in (FULL, SLIDING):
            problem = f"layer_types[{index}] {shown(layer_type)} is not supported for {config.family}"
            raise config.error(problem, "layer_types", index)
    window = config.optional_integer("sliding_window")
    if window is None and SLIDING in types:
        problem = f"layer {types.index(SLIDING)} is sliding_attention, and there is no sliding_window"
        raise config.error(problem, "layer_types")
    gated = config.boolean("use_head_wise_attn_gate", True)
    full = parts.attention(config, qk_norm="head", bias=config.boolean("attention_bias", False))
    full = replace(full, output_gate="head" if gated else False)
    sliding = replace(_other_heads(config, full), window=window)
    sparse = _enumerated(config, count, further)
    read = Grouped(
        Experts(shared_width="share_expert_dim", router_bias=config.boolean("use_moe_router_bias", True)),
        sparse=lambda _: sparse,
        mlp_biased="mlp_bias",
    )
    return read.model(config, name, [full if layer_type == FULL else sliding for layer_type in types])


def _other_heads(config: Config, full: Attention) -> Attention:
    """Return the attention of sliding layers: with the heads of attention_other_setting, if there are such."""
    heads = config.optional_integer("num_sliding_attention_heads") or full.heads
    other = config.nested("attention_other_setting")
    if other is None:
        return replace(full, heads=heads)
    for key in ("head_dim", "true_head_dim"):
        dim = other.optional_integer(key)
        if dim not in (None, full.head_dim):
            raise other.error(f"{key} {dim} is not the head_dim {full.head_dim} of the other layers", key)
    other.word("attention_type", (SLIDING,))
    heads = config.optional_integer("num_sliding_attention_heads") or other.integer(
        "num_attention_heads", default=full.heads
    )
    kv_heads = other.integer("num_attention_groups", "num_key_value_heads", default=full.kv_heads)
    other.check_divides("num_attention_groups", kv_heads, "num_attention_heads", heads)
    return replace(full, heads=heads, kv_heads=kv_heads)


def _enumerated(config: Config, count: int, further: int) -> list[bool]:
    """Return which layers have experts: by mlp_layer_types, by moe_layers_enum, else all but the first three."""
    types, listed = config.strings("mlp_layer_types"), config.data.get("moe_layers_enum")
    if types is not None:
        if len(types) not in (count, count + further) or set(types) - {"dense", "sparse"}:
            problem = f"mlp_layer_types must say dense or sparse for each of {count} layers"
            raise config.error(problem, "mlp_layer_types")
        return [layer_type == "sparse" for layer_type in types[:count]]
    if listed is None:
        return [index >= 3 for index in range(count)]
    words = listed.split(",") if isinstance(listed, str) else listed
    try:
        chosen = {int(str(word)) for word in words if str(word).strip()}
    except (TypeError, ValueError):
        problem = f"moe_layers_enum must have numbers of layers with commas between them, and is {shown(listed)}"
        raise config.error(problem, "moe_layers_enum") from None
    return [index in chosen for index in range(count)]


def molmo2(config: Config, name: str) -> ModelSpec:
    """Molmo 2: no bias on the output projection; additional_vocab_size tokens are input alone."""
    full = config.word("qk_norm_type", ("qwen3", "olmo")) == "olmo"
    spec = dense(config, name, covers="qkv", qk_norm="full" if full else "head")
    more = config.optional_integer("additional_vocab_size", low=0)
    return replace(spec, extras=(Extra(name="embedding of input tokens", vectors=more, lookup=True),)) if more else spec


def chameleon(config: Config, name: str) -> ModelSpec:
    """Chameleon: queries and keys are normed with weights and biases of each head's own."""
    spec = llama(config, name)
    heads = parts.attention(config)
    norms = Extra(name="qk-norm", elements=2 * (heads.heads + heads.kv_heads) * heads.head_dim)
    return spec.map_layers(lambda layer: replace(layer, extras=(norms,)))


def voxtral_realtime(config: Config, name: str) -> ModelSpec:
    """Voxtral Realtime: Mistral with a window, and in each layer scales by the delay, made with 32 features."""
    spec = dense(config, name, windows=parts.one_window, bias=False)
    scales = Extra(name="scales by the delay", vectors=2 * VOXTRAL_SCALES)
    return spec.map_layers(lambda layer: replace(layer, extras=(scales,)))


VOXTRAL_SCALES = 32
"""Their width, which the code has. They take one product for a whole sequence, and not one for each token."""


def _muse_attention(config: Config) -> list[Attention]:
    """Return the attention of Muse: a window in all layers but each fourth before the last, and a gate per feature."""
    count, window = config.layer_count, config.optional_integer("sliding_window")
    types = [SLIDING if (count - 1 - index) % 4 else FULL for index in range(count)]
    windows = parts.windows_of(config, window, types)
    bias = config.boolean("attention_bias", False)
    return parts.attention_layers(config, windows, output_gate=True, bias=bias)


def muse_glimmer(config: Config, name: str) -> ModelSpec:
    """Muse Glimmer: Gemma's four norms a layer, and norms of queries and keys without weights."""
    return gates_without_bias(layered(config, name, _muse_attention(config), norm=Norm(per_layer=4)))


def muse_spark(config: Config, name: str) -> ModelSpec:
    """Muse Spark: as Muse Glimmer, with a gate of m weights on each residual, and experts of moe_hidden_size features.

    The norm after attention has no weights. Experts have a norm before and one after them, in their own width.
    """
    latent = config.integer("moe_hidden_size")

    def moe(config: Config, keys: Experts) -> MoE:
        return replace(moe_of(config, keys), latent_size=latent)

    read = Grouped(Experts(router_bias=True), sparse=partial(sparse_layers, first=0), norm=Norm(per_layer=3))
    spec = gates_without_bias(read.model(config, name, _muse_attention(config), moe))

    def gated(layer: Layer) -> Layer:
        norm = (Extra(name="latent norms", elements=2 * latent),) if isinstance(layer.ffn, MoE) else ()
        return replace(layer, extras=(*layer.extras, Extra(name="residual gates", vectors=2), *norm))

    return spec.map_layers(gated)


STEP_NAMES = {
    "n_routed_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "num_key_value_heads": "num_attention_groups",
    "share_expert_dim": "share_expert_dims",
}

STEP = keys(
    """
    att_impl_type first_k_dense_replace gating max_seq_len moe_every_n_layer moe_layer_offset moe_layers_enum
    moe_router_activation moe_router_scaling_factor mtp_layer_types mtp_mlp_layer_types need_fp32_gate
    norm_expert_weight num_local_experts partial_rotary_factors per_layer_config sink swiglu_limits
    swiglu_limits_shared use_bidirectional_attention use_mfa use_moe use_rope_layers yarn_only_types zero_centered
    """
)
"""Keys of Step's files that change no count, or that its code derives from others."""

MUSE = keys("output_multiplier post_norm_eps qk_scale_factor residual_gate_temperature")

OCR = Grouped(Experts(shared="n_shared_experts"), sparse=sparse_layers, mlp_biased="mlp_bias")

FAMILIES: dict[str, Family] = {
    "chameleon": Family(chameleon, inert=keys("model_parallel_size swin_norm vocabulary_map vq_config")),
    "cosmos3_edge_text": Family(partial(dense, mlp_bias="mlp_bias", gated=False)),
    "deepseek_ocr2_text": Family(OCR),
    "glm_ocr_text": Family(partial(glm4, bias=False)),
    "granite4_vision_text": Family(llama),
    "granite_docling_text": Family(llama),
    "hunyuan_vl_text": Family(hunyuan),
    "molmo2_text": Family(molmo2, inert=keys("norm_after rope_scaling_layers")),
    "muse_glimmer_text": Family(muse_glimmer, inert=MUSE),
    "muse_spark_text": Family(muse_spark, inert=MUSE),
    "paddleocr_vl_text": Family(partial(dense, bias="use_bias", mlp_bias="use_bias")),
    "qwen2_5_omni_text": Family(qwen2),
    "qwen3_omni_moe_text": Family(qwen3_moe, defaults={"max_window_layers": 0}, inert=UNUSED_WIDTH),
    "step3p5": Family(step, inert=STEP, aliases=STEP_NAMES),
    "voxtral_realtime_text": Family(voxtral_realtime),
}
"""Reader by model_type."""
