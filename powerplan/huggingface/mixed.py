"""Families of experts whose layers differ in more than a window, or whose config.json has a form of its own."""

from __future__ import annotations

import dataclasses

from msgspec.structs import replace

from powerplan.errors import shown
from powerplan.extras import Extra
from powerplan.ffn import MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import MAX_CONFIG_LAYERS, Config, Family, keys
from powerplan.huggingface.experts import Experts, Grouped, listed, sparse_layers, typed_windows
from powerplan.huggingface.parts import FULL, SLIDING
from powerplan.huggingface.rope_styles import rotated_layers
from powerplan.mixers import Attention, ChunkedAttention, IndexedBlocks
from powerplan.spec import Layer, ModelSpec, Norm

CHUNKED = "chunked_attention"


def llama4(config: Config, name: str) -> ModelSpec:
    """Llama 4: attention within chunks where there is RoPE, over all keys where there is none; a shared expert.

    moe_layers lists the layers with experts, else the last of each interleave_moe_layer_step. The others have an MLP of
    intermediate_size_mlp. qk-norm has no weights.
    """
    count = config.layer_count
    step, rotated = config.integer("interleave_moe_layer_step"), rotated_layers(config, count)
    if len(rotated) != count:
        raise config.error(f"no_rope_layers has {len(rotated)} entries for {count} layers", "no_rope_layers")
    chunk = config.optional_integer("attention_chunk_size")
    default = [CHUNKED if rope and chunk else FULL for rope in rotated]
    types = parts.layer_types(config, default, (FULL, CHUNKED))
    full = parts.attention(config, bias=config.boolean("attention_bias", False))
    if chunk is None and CHUNKED in types:
        raise config.error(
            "attention_chunk_size is null, and there are layers of chunked_attention", "attention_chunk_size"
        )
    chunked = ChunkedAttention(
        heads=full.heads, kv_heads=full.kv_heads, head_dim=full.head_dim, bias=full.bias, window=chunk or 1
    )
    moe_layers = config.integers("moe_layers") if config.has("moe_layers") else range(step - 1, count, step)
    shared = Experts(width="intermediate_size", shared_width="intermediate_size")
    read = Grouped(
        shared, sparse=lambda _: [index in moe_layers for index in range(count)], dense="intermediate_size_mlp"
    )
    return read.model(config, name, [full if layer_type == FULL else chunked for layer_type in types])


def mimo_v2_flash(config: Config, name: str) -> ModelSpec:
    """MiMo-V2-Flash: sliding layers have twice the key/value heads and sinks; values are shorter than keys.

    The published file has hybrid_layer_pattern (1 for a window), moe_layer_freq (1 for experts), swa_* for the heads of
    sliding layers. sliding_window_size is the number of tokens before the query, as in SGLang and transformers.
    """
    config.refuse("n_shared_experts", "no published MiMo-V2 has them")
    count = config.layer_count
    types = [SLIDING if index and (index + 1) % 6 else FULL for index in range(count)]
    if config.has("hybrid_layer_pattern"):
        types = [SLIDING if slides else FULL for slides in listed(config, "hybrid_layer_pattern", count)]
    types = list(parts.layer_types(config, types, (FULL, SLIDING)))
    before, window = config.optional_integer("sliding_window_size"), config.optional_integer("sliding_window")
    window = before + 1 if before else window
    if window is None and SLIDING in types:
        raise config.error("sliding_window is null, and there are layers of sliding_attention", "sliding_window")
    bias = "qkv" if config.boolean("attention_bias", False) else False
    full = parts.attention(config, bias=bias, sinks=config.boolean("add_full_attention_sink_bias", False))
    full = replace(full, v_head_dim=config.integer("v_head_dim"))
    heads, kv_heads = "swa_num_attention_heads", "swa_num_key_value_heads"
    sliding = replace(
        full,
        heads=config.integer(heads, default=full.heads),
        kv_heads=config.integer(kv_heads, default=2 * full.kv_heads),
        head_dim=config.integer("swa_head_dim", default=full.head_dim),
        v_head_dim=config.integer("swa_v_head_dim", default=full.v_head_dim),
        sinks=config.boolean("add_swa_attention_sink_bias", True),
        window=window,
    )
    read = Grouped(Experts(router_bias=True), sparse=sparse_layers)
    return read.model(config, name, [full if layer_type == FULL else sliding for layer_type in types])


def laguna(config: Config, name: str) -> ModelSpec:
    """Laguna: query heads by layer, a gate of the output per head (gating true or "per-head") or per feature."""
    count = config.layer_count
    default = parts.attention(config)
    heads = config.integers("num_attention_heads_per_layer") or [default.heads] * count
    if len(heads) != count:
        key = "num_attention_heads_per_layer"
        raise config.error(f"{key} has {len(heads)} entries for {count} layers", key)
    gating, bias = config.value("gating"), config.boolean("attention_bias", False)
    per_head = gating in (True, None, "per-head")
    windows = typed_windows(config, lambda config, index: False)
    mixers = [
        replace(
            default, heads=number, window=window, bias=bias, qk_norm="head", output_gate="head" if per_head else True
        )
        for number, window in zip(heads, windows, strict=True)
    ]
    shared = Experts(shared_width="shared_expert_intermediate_size", router_bias=True)
    spec = Grouped(shared, sparse=sparse_layers).model(config, name, mixers)
    return gates_without_bias(spec)


def afmoe(config: Config, name: str) -> ModelSpec:
    """AFMoE (Trinity): a gate per feature of the output, four norms, windows in all but the last layer of a period."""
    dense, period = config.optional_integer("num_dense_layers", low=0) or 0, "global_attn_every_n_layers"
    read = Grouped(
        Experts(shared="num_shared_experts", router_bias=True),
        sparse=lambda config: [index >= dense for index in range(config.layer_count)],
        windows=lambda config: typed_windows(config, lambda config, index: (index + 1) % config.integer(period) != 0),
        heads={"qk_norm": "head", "output_gate": True},
        norm=Norm(per_layer=4),
    )
    return gates_without_bias(read(config, name))


def gates_without_bias(spec: ModelSpec) -> ModelSpec:
    """Return the spec with gates of outputs that have no biases where the other projections do."""

    def changed(layer: Layer) -> Layer:
        mixer = layer.mixer
        if not isinstance(mixer, Attention) or not mixer.bias or mixer.output_gate is not True:
            return layer
        gate = Extra(name="output gate", vectors=mixer.heads * mixer.v_head_dim, matmul=True)
        return replace(layer, mixer=replace(mixer, output_gate=False), extras=(*layer.extras, gate))

    return spec.map_layers(changed)


def cohere2_moe(config: Config, name: str) -> ModelSpec:
    """Command A MoE: attention and experts behind one norm, a window in three layers of four; the first may be dense.

    Layers before first_k_dense_replace have windows of a period of their own, prefix_dense_sliding_window_pattern.
    """
    first = config.optional_integer("first_k_dense_replace", low=0) or 0
    period, prefix = config.integer("sliding_window_pattern"), config.integer("prefix_dense_sliding_window_pattern")

    def slides(config: Config, index: int) -> bool:
        return (index + 1) % prefix != 0 if index < first else (index - first + 1) % period != 0

    norm = Norm(kind="layernorm" if config.value("rms_norm_eps") is None else "rmsnorm", per_layer=1, bias=False)
    read = Grouped(
        Experts(width="intermediate_size", shared="num_shared_experts"),
        sparse=lambda config: sparse_layers(config, first=0),
        windows=lambda config: typed_windows(config, slides),
        norm=norm,
        dense="prefix_dense_intermediate_size",
    )
    return read(config, name)


def ernie4_5_moe(config: Config, name: str) -> ModelSpec:
    """ERNIE 4.5 MoE: experts from moe_layer_start_index to moe_layer_end_index; use_bias is for all but the experts."""
    last = config.integer("moe_layer_end_index", low=-1)
    start, step = config.integer("moe_layer_start_index", low=0), config.integer("moe_layer_interval")
    count = config.layer_count
    last = count - 1 if last == -1 else last
    sparse = [(index + 1) % step == 0 and start <= index <= last for index in range(count)]
    return dataclasses.replace(ERNIE, sparse=lambda config: sparse)(config, name)


def ernie4_5_vl_moe(config: Config, name: str) -> ModelSpec:
    """ERNIE 4.5 VL MoE: moe_intermediate_size has the width of experts for text, then of those for images."""
    width, *_ = config.integers("moe_intermediate_size") or [1536, 512]
    config.note("experts for images are not counted: tokens of text do not use them")

    def moe(config: Config, keys: Experts) -> MoE:
        experts = config.integer("moe_num_experts", "num_experts")
        return MoE(
            experts=experts,
            top_k=parts.experts_chosen(config, experts),
            intermediate_size=width,
            shared_intermediate_size=width * (config.optional_integer(keys.shared, low=0) or 0),
            router_bias=True,
        )

    mixers = parts.attention_layers(config, [None] * config.layer_count, bias=config.boolean("use_bias", False))
    return ERNIE.model(config, name, mixers, moe)


ERNIE = Grouped(
    Experts(shared="moe_num_shared_experts", router_bias=True),
    sparse=sparse_layers,
    biased="use_bias",
    mlp_biased="use_bias",
    head_biased="use_bias",
)


def hunyuan_moe(config: Config, name: str) -> ModelSpec:
    """HunYuan A13B: experts of intermediate_size and one shared expert in every layer, qk-norm per head.

    The published file has lists with one entry per layer, such as moe_topk, and keys of the dense HunYuan.
    """
    config.refuse("use_cla", "layers that share keys and values are not read")
    for key in ("use_qk_norm", "use_mixed_mlp_moe"):
        if not config.boolean(key, True):
            raise config.error(f"{key} false is not supported: transformers' hunyuan_v1_moe always has it", key)
    width = parts.alike(config, "intermediate_size")
    for key, expected in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        if config.has(key) and parts.alike(config, key) != expected:
            problem = (
                f"{key} {shown(config.value(key))} is not supported: transformers' hunyuan_v1_moe has {expected:,}"
            )
            raise config.error(problem, key)
    spec = Grouped(HUNYUAN, heads={"qk_norm": "head"})(config, name)
    stated = config.optional_integer("attention_head_dim")
    for mixer in spec.mixers():
        if isinstance(mixer, Attention) and stated not in (None, mixer.head_dim):
            raise config.error(f"attention_head_dim {stated} is not head_dim {mixer.head_dim}", "attention_head_dim")
    return spec


HUNYUAN = Experts(width="intermediate_size", shared_width="intermediate_size")


def dbrx(config: Config, name: str) -> ModelSpec:
    """DBRX: sizes in attn_config and ffn_config; layernorms without biases; all layers have experts."""
    attn, ffn = config.nested("attn_config") or config, config.nested("ffn_config") or config
    hidden, heads = config.integer("hidden_size", "d_model"), config.integer("num_attention_heads", "n_heads")
    config.check_divides("n_heads", heads, "d_model", hidden)
    kv_heads = attn.integer("kv_n_heads", default=1)
    attn.check_divides("kv_n_heads", kv_heads, "n_heads", heads)
    experts, chosen = ffn.integer("moe_num_experts", default=4), ffn.integer("moe_top_k", default=1)
    width = ffn.integer("ffn_hidden_size", default=3584)
    layer = Layer(
        mixer=Attention(heads=heads, kv_heads=kv_heads, head_dim=hidden // heads),
        ffn=MoE(experts=experts, top_k=chosen, intermediate_size=width),
    )
    count = config.integer("num_hidden_layers", "n_layers", high=MAX_CONFIG_LAYERS)
    return parts.assemble(config, name, [layer] * count, norm=Norm(kind="layernorm", bias=False))


def minimax_m3(config: Config, name: str) -> ModelSpec:
    """MiniMax-M3: block-sparse attention in layers of minimax_m3_sparse, qk-norm per head, a shared expert.

    The published file has the sizes of the indexer in sparse_attention_config, and there sparse_attention_freq, 1 for
    such a layer. Dense layers have an MLP of dense_intermediate_size.
    """
    count = config.layer_count
    config.refuse("attention_output_gate", "no published MiniMax-M3 has it")
    parts.note_prediction_layers(config, "num_mtp_modules", "num_nextn_predict_layers")
    published = config.nested("sparse_attention_config")
    types = [FULL] * count
    if published is not None and published.has("sparse_attention_freq"):
        types = [M3_SPARSE if picks else FULL for picks in listed(published, "sparse_attention_freq", count)]
    types = list(parts.layer_types(config, types, (FULL, M3_SPARSE)))
    if published is not None and published.has("sparse_disable_index_value"):
        without = listed(published, "sparse_disable_index_value", count)
        if not all(off for off, kind in zip(without, types, strict=True) if kind == M3_SPARSE):
            problem = "sparse_disable_index_value leaves a sparse layer an indexer with values, which is not read"
            raise published.error(problem, "sparse_disable_index_value")

    def size(name: str, other: str) -> int:
        stated = config.integer(name)
        return published.integer(other, default=stated) if published is not None else stated

    full = parts.attention(config, qk_norm="head")
    indexed = IndexedBlocks(
        heads=full.heads,
        kv_heads=full.kv_heads,
        head_dim=full.head_dim,
        qk_norm="head",
        index_heads=size("index_n_heads", "sparse_num_index_heads"),
        index_head_dim=size("index_head_dim", "sparse_index_dim"),
        block_size=size("index_block_size", "sparse_block_size"),
        top_k=size("index_topk_blocks", "sparse_topk_blocks"),
    )
    read = Grouped(
        Experts(width="intermediate_size", shared_width="shared_intermediate_size", router_bias=True),
        sparse=lambda config: sparse_layers(config, first=0),
        dense="dense_intermediate_size",
    )
    return read.model(config, name, [full if layer_type == FULL else indexed for layer_type in types])


M3_SPARSE = "minimax_m3_sparse"

DBRX_KEYS = keys(
    """
    clip_qkv ffn_act_fn hidden_size moe_jitter_eps moe_loss_weight moe_normalize_expert_weights num_key_value_heads
    rope_theta uniform_expert_assignment
    """
)

MIMO = keys("attention_chunk_size attention_projection_layout attention_value_scale layernorm_epsilon")

HUNYUAN_KEYS = keys(
    """
    cla_share_factor dense_list im_end_id im_newline_id im_start_id mask_init_id norm_type num_media_embeds
    org_vocab_size pad_id pool_type text_end_id text_start_id use_rotary_pos_emb video_end_id video_start_id
    """
)

M3_KEYS = keys(
    """
    first_k_dense_replace index_local_blocks moe_intermediate_size n_shared_experts qk_norm_type sparse_attention_config
    sparse_local_block sparse_score_type use_gemma_norm use_qk_norm use_routing_bias use_sparse_attention
    """
)
"""Keys of MiniMax-M3 that its code does not read, or that say again what others say."""

FAMILIES: dict[str, Family] = {
    "afmoe": Family(afmoe, inert=frozenset({"global_attn_every_n_layers", "num_expert_groups", "use_grouped_mm"})),
    "cohere2_moe": Family(cohere2_moe),
    "dbrx": Family(dbrx, inert=DBRX_KEYS),
    "ernie4_5_moe": Family(ernie4_5_moe, inert=frozenset({"moe_capacity", "moe_gate", "moe_use_aux_free"})),
    "ernie4_5_vl_moe_text": Family(ernie4_5_vl_moe),
    "hunyuan_v1_moe": Family(hunyuan_moe, inert=HUNYUAN_KEYS),
    "laguna": Family(laguna),
    "llama4_text": Family(llama4, inert=frozenset({"for_llm_compressor", "use_qk_norm"})),
    "mimo_v2_flash": Family(mimo_v2_flash, inert=MIMO),
    "minimax_m3": Family(minimax_m3, like="minimax_m3_vl_text", inert=M3_KEYS),
    "minimax_m3_vl_text": Family(minimax_m3, inert=M3_KEYS),
}
"""Reader by model_type."""
