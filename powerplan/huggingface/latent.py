"""Families of multi-head latent attention (MLA, DSA) and mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import asdict, replace

from powerplan.extras import Extra
from powerplan.ffn import MLP, MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import MAX_CONFIG_LAYERS, Config, Family, keys
from powerplan.huggingface.experts import Experts, Grouped, routed_experts, shared_biases, sparse_layers
from powerplan.huggingface.parts import SLIDING
from powerplan.mixers import DSA, MLA, AnyMixer, Compressed
from powerplan.spec import Layer, ModelSpec

ROUTED, SHARED = ("n_routed_experts", "num_local_experts", "num_experts"), ("n_shared_experts", "num_shared_experts")


def deepseek_v2(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V2 and V2-Lite: MLA, the first layers dense, then experts.

    With use_mla false, as in DeepSeek-VL2-Tiny, DeepSeek's own code has the attention of Llama instead. With
    topk_method noaux_tc, as in DeepSeek-VL2, its router has the bias of DeepSeek-V3.
    """
    if not config.boolean("use_mla", True):
        experts = Experts(shared="n_shared_experts", router_bias=config.value("topk_method") == "noaux_tc")
        read = Grouped(experts, sparse=sparse_layers, mlp_biased="mlp_bias")
        return read(config, name)
    corrected, bias = config.value("topk_method") == "noaux_tc", config.boolean("mlp_bias", False)
    return _deepseek(config, name, _mla(config), router_bias=corrected, bias=bias)


def deepseek_v3(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V3, R1 and Kimi K2: MLA, the first layers dense, then experts.

    The router's correction bias (e_score_correction_bias, one per expert) is stored with the weights and counts as a
    parameter, as in DeepSeek's own code; transformers holds the same tensor as a buffer.
    """
    corrected = (config.data.get("topk_method") or "noaux_tc") == "noaux_tc"
    return _deepseek(config, name, _mla(config), router_bias=corrected)


def deepseek_v32(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V3.2: DeepSeek-V3 with an indexer that picks the keys of every layer (DSA)."""
    return _deepseek(config, name, _dsa(config), router_bias=True)


def glm4_moe_lite(config: Config, name: str) -> ModelSpec:
    """GLM-4.7 Flash: as DeepSeek-V3, with one dense layer where the file does not say."""
    return _deepseek(config, name, _mla(config), router_bias=True)


def glm_moe_dsa(config: Config, name: str) -> ModelSpec:
    """GLM-5: DSA whose "shared" layers (indexer_types) attend to the keys that an earlier "full" layer picked.

    Without indexer_types: index_topk_pattern, letters F and S, or one full layer in index_topk_freq.
    """
    count = config.layer_count
    letters = config.value("index_topk_pattern")
    if isinstance(letters, str):
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in letters]
    else:
        period, offset = (
            config.integer("index_topk_freq", default=1),
            config.integer("index_skip_topk_offset", default=2),
        )
        types = ["shared" if max(index - offset + 1, 0) % period else "full" for index in range(count)]
        types = config.strings("index_topk_pattern") or types
    mixers = _indexed(config, _dsa(config), types)
    return _deepseek(config, name, mixers, router_bias=True)


def mistral4(config: Config, name: str) -> ModelSpec:
    """Mistral Small 4: as DeepSeek-V3, experts in every layer, and no bias of the router."""
    return _deepseek(config, name, _mla(config), router_bias=False)


def axk1(config: Config, name: str) -> ModelSpec:
    """A.X K1: DeepSeek-V3 with a norm after the experts."""
    spec = _deepseek(config, name, _mla(config), router_bias=True)
    return spec.map_layers(lambda layer: replace(layer, norms=3) if isinstance(layer.ffn, MoE) else layer)


def axk2(config: Config, name: str) -> ModelSpec:
    """A.X K2: DSA whose query latent, twice as wide, also makes a gate of the output; norms with a low-rank gate.

    The norm before a dense MLP has no gate. transformers 5.23, axk2, AXK2Attention and AXK2GatedRMSNorm.
    """
    dsa = _dsa(config)
    rank, latent = config.integer("gated_norm_rank"), dsa.q_lora_rank or 0
    gate = latent * dsa.heads * (dsa.qk_nope_head_dim + dsa.qk_rope_head_dim + 2 * dsa.v_head_dim)
    query = Extra(name="output gate and wider query", elements=gate, matmul=True)

    def gated(layer: Layer) -> Layer:
        count = 2 if isinstance(layer.ffn, MoE) else 1
        norms = Extra(name="gates of norms", vectors=2 * rank * count, matmul=True)
        return replace(layer, extras=(query, norms))

    return _deepseek(config, name, dsa, router_bias=True).map_layers(gated)


def hy_v4(config: Config, name: str) -> ModelSpec:
    """HY 4: DSA with shared indices, sinks and an output gate; hyper-connections of hc_mult residual streams.

    Each layer has two connections, of 2n x nm weights for n streams, and the model one of n x nm. Streams are
    activations: they are not counted.
    """
    types = ["shared" if index and (index - 1) % 4 else "full" for index in range(config.layer_count)]
    mixers = _indexed(config, replace(_dsa(config), output_gate=True), types)
    streams = config.integer("hc_mult")
    connections, head = _hyper_connections(streams, 2 * streams, scales=2)
    extras = (Extra(name="sinks", elements=mixers[0].heads), *connections)
    spec = _deepseek(config, name, mixers, router_bias=True)
    return replace(spec.map_layers(lambda layer: replace(layer, extras=extras)), extras=head)


def _hyper_connections(streams: int, rows: int, scales: int) -> tuple[tuple[Extra, ...], tuple[Extra, ...]]:
    """Return the parameters of the two hyper-connections of a layer, and of the one before the LM head.

    Each multiplies all n streams, nm features, with a matrix: of `rows` rows in a layer, n before the head. It has as
    many biases, and scales: `scales` in a layer, one before the head.
    """
    name = "hyper-connections"
    layer = Extra(name=name, vectors=2 * rows * streams, matmul=True), Extra(name=name, elements=2 * (rows + scales))
    return layer, (Extra(name=name, vectors=streams**2, matmul=True), Extra(name=name, elements=streams + 1))


def deepseek_v4(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V4: compressed attention, hyper-connections; experts in all layers, by hashes of tokens in the first.

    layer_types, or compress_ratios of the original files: 0 a window alone, 4 (CSA) with an indexer, 128 (HCA) without.
    A layer whose experts hashes choose (num_hash_layers) has no router bias. Its table of them is not counted.
    """
    count, bias = config.layer_count, config.boolean("mlp_bias", False)
    ratios = config.integers("compress_ratios")
    types = [HCA if index < 2 or index % 2 == 0 else CSA for index in range(count)]
    if ratios and not config.has("layer_types"):
        kinds = {0: SLIDING, 4: CSA, 128: HCA}
        if len(ratios) < count or not set(ratios) <= set(kinds):
            raise config.error(f"compress_ratios must have 0, 4 or 128 for each of {count} layers", "compress_ratios")
        types = [kinds[ratio] for ratio in ratios[:count]]
    types = list(parts.layer_types(config, types, (SLIDING, CSA, HCA)))
    rates = config.nested("compress_rates")
    window_alone = Compressed(
        heads=config.integer("num_attention_heads"),
        head_dim=config.integer("head_dim"),
        q_lora_rank=config.integer("q_lora_rank"),
        output_groups=config.integer("o_groups"),
        output_rank=config.integer("o_lora_rank"),
        window=config.integer("sliding_window"),
        compress_rate=None,
    )
    by_type = {SLIDING: window_alone}
    for kind, rate, scalar in ((CSA, 4, "compress_rate_csa"), (HCA, 128, "compress_rate_hca")):
        stated = rates.integer(kind, default=rate) if rates else rate
        by_type[kind] = replace(window_alone, compress_rate=config.integer(scalar, default=stated))
    by_type[CSA] = replace(
        by_type[CSA],
        index_heads=config.integer("index_n_heads"),
        index_head_dim=config.integer("index_head_dim"),
        top_k=config.integer("index_topk"),
    )
    streams = config.integer("hc_mult")
    connections, head = _hyper_connections(streams, (2 + streams) * streams, scales=3)
    if config.integer("n_shared_experts") != 1:
        raise config.error("n_shared_experts is not 1, and transformers' deepseek_v4 has one", "n_shared_experts")
    moe = routed_experts(config, ROUTED, SHARED, router_bias=True)
    extras = (*(shared_biases(moe) if bias else ()), *connections)
    parts.note_prediction_layers(config, "num_nextn_predict_layers")
    layers = [
        Layer(mixer=by_type[kind], ffn=replace(moe, router_bias=not hashed), extras=extras)
        for kind, hashed in zip(types, _hashed(config, count), strict=True)
    ]
    return parts.assemble(config, name, layers, extras=head)


CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"


def _hashed(config: Config, count: int) -> list[bool]:
    """Return which layers of DeepSeek-V4 choose experts by a hash of the token."""
    first = config.integer("num_hash_layers", default=3, low=0)
    types = config.strings("mlp_layer_types") or ["hash_moe" if index < first else "moe" for index in range(count)]
    parts.check_words(config, "mlp_layer_types", types, "hash_moe", "moe")
    return [layer_type == "hash_moe" for layer_type in types]


def longcat_flash(config: Config, name: str) -> ModelSpec:
    """LongCat-Flash: each of num_layers layers has MLA and a dense MLP twice, and experts beside them.

    The experts read what the first MLP reads, and are added after the second. They are a layer without norms here. Some
    of the router's choices are no experts (zero_expert_num).
    """
    config.refuse("router_bias", "no published LongCat-Flash has it")
    mixer, mlp = _mla(config), MLP(intermediate_size=config.integer("intermediate_size", "ffn_hidden_size"))
    config.derived(
        "qk_head_dim", mixer.qk_nope_head_dim + mixer.qk_rope_head_dim, "qk_nope_head_dim + qk_rope_head_dim"
    )
    experts = config.integer(*ROUTED)
    moe = MoE(
        experts=experts,
        top_k=parts.experts_chosen(config, experts),
        intermediate_size=config.integer("moe_intermediate_size", "expert_ffn_hidden_size"),
        zero_experts=config.optional_integer("zero_expert_num", low=0) or 0,
        router_bias=True,
    )
    layer = [Layer(mixer=mixer, ffn=mlp), Layer(ffn=moe, norms=0), Layer(mixer=mixer, ffn=mlp)]
    return parts.assemble(config, name, layer * config.integer("num_layers", high=MAX_CONFIG_LAYERS))


def _mla(config: Config) -> MLA:
    for key in ("index_topk", "index_n_heads"):
        config.refuse(key, "sparse attention with an indexer (DeepSeek-V3.2) is not MLA alone")
    return parts.mla(config)


def _dsa(config: Config) -> DSA:
    mla = parts.mla(config)
    if mla.q_lora_rank is None:
        raise config.error("q_lora_rank is null, and the indexer's queries come from the query latent", "q_lora_rank")
    return DSA(
        **asdict(mla),
        index_heads=config.integer("index_n_heads", default=64),
        index_head_dim=config.integer("index_head_dim", default=128),
        top_k=config.integer("index_topk", default=2048),
    )


def _indexed(config: Config, dsa: DSA, default: list[str]) -> list[DSA]:
    """Return the mixer of each layer: with an indexer, or with the selection of an earlier layer."""
    types = config.strings("indexer_types") or default
    if len(types) != config.layer_count or set(types) - {"full", "shared"} or types[0] != "full":
        key = "indexer_types" if config.has("indexer_types") else "index_topk_pattern"
        problem = f"{key} must say full or shared for each of {config.layer_count} layers, and begin with full"
        raise config.error(problem, key)
    shared = replace(dsa, shared_index=True)
    return [shared if layer_type == "shared" else dsa for layer_type in types]


def _deepseek(
    config: Config,
    name: str,
    mixer: AnyMixer | Sequence[AnyMixer],
    *,
    router_bias: bool,
    bias: bool = False,
) -> ModelSpec:
    """Return the spec with dense MLPs, then experts and shared ones.

    bias: whether dense MLPs and shared experts have biases.
    """
    parts.note_prediction_layers(config, "num_nextn_predict_layers", "num_mtp_layers")
    dense = Layer(ffn=MLP(intermediate_size=config.integer("intermediate_size"), bias=bias))
    sparse = sparse_layers(config)
    routed = dense
    if config.data.get("n_routed_experts", 0) is None:  # All layers are dense, and these keys stand for nothing.
        parts.look_up(config, "moe_intermediate_size", "n_shared_experts", "num_experts_per_tok")
    else:
        moe = routed_experts(config, ROUTED, SHARED, router_bias)
        routed = Layer(ffn=moe, extras=shared_biases(moe) if bias else ())
    mixers = mixer if isinstance(mixer, Sequence) else [mixer] * len(sparse)
    pairs = zip(mixers, sparse, strict=True)
    return parts.assemble(config, name, [replace(routed if sparse else dense, mixer=mixer) for mixer, sparse in pairs])


MLA_KEYS = frozenset({"head_dim", "qk_head_dim", "num_key_value_heads"})
"""Keys of files with latent attention that no code reads: the head dims are in other keys, and heads share no keys."""

DSA_KEYS = MLA_KEYS | {"indexer_rope_interleave", "layer_types"}
"""layer_types names the cache, which is the same in all layers."""

LONGCAT = MLA_KEYS | keys("attention_method mla_scale_kv_lora mla_scale_q_lora num_hidden_layers zero_expert_type")

V4_KEYS = keys("attention_bias expert_dtype intermediate_size num_key_value_heads qk_rope_head_dim")

FAMILIES: dict[str, Family] = {
    "axk1": Family(axk1, inert=MLA_KEYS),
    "axk2": Family(axk2, inert=DSA_KEYS),
    "deepseek_v2": Family(deepseek_v2, inert=MLA_KEYS | {"lm_head", "rm_head"}),
    "deepseek_v3": Family(deepseek_v3, inert=MLA_KEYS),
    "deepseek_v32": Family(deepseek_v32, inert=DSA_KEYS | {"mlp_bias"}),
    "deepseek_v4": Family(deepseek_v4, inert=V4_KEYS),
    "glm4_moe_lite": Family(glm4_moe_lite, inert=MLA_KEYS),
    "glm_moe_dsa": Family(glm_moe_dsa, inert=DSA_KEYS | {"mlp_bias"}, aliases={"num_experts": "n_routed_experts"}),
    "hy_v4": Family(hy_v4, inert=DSA_KEYS),
    "hy_v4_vl_text": Family(hy_v4, inert=DSA_KEYS),
    "kimi_k2": Family(deepseek_v3, like="deepseek_v3", inert=MLA_KEYS),
    "mistral4": Family(mistral4, inert=MLA_KEYS),
    "longcat_flash": Family(longcat_flash, inert=LONGCAT),
}
"""Reader by model_type."""
