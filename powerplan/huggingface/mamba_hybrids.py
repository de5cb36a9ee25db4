"""Families with Mamba beside attention: Bamba, Granite 4, Falcon-H1, Apriel-H1, and Zamba with one shared attention."""

from __future__ import annotations

from msgspec.structs import replace

from powerplan.extras import Extra
from powerplan.ffn import MLP, AnyFFN, MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family, keys
from powerplan.huggingface.mamba import MAMBA_KEYS, mamba1, step_rank
from powerplan.huggingface.parts import FULL, LINEAR
from powerplan.mixers import Attention, Mamba1, Mamba2
from powerplan.part import MAX_WIDTH
from powerplan.spec import Layer, ModelSpec

MAMBA, ATTENTION, HYBRID = "mamba", "attention", "hybrid"
"""Words of files for kinds of layers."""

OTHER_WORDS = {LINEAR: MAMBA, FULL: ATTENTION, "multihead_attention": ATTENTION}
"""Other words that transformers reads for them."""


def _types(config: Config, key: str, default: list[str], *allowed: str) -> list[str]:
    """Return the kind of each layer, one of the words `allowed`: those under `key`, else `default`."""
    words = config.strings(key)
    types = default if words is None else [OTHER_WORDS.get(word, word) for word in words]
    parts.check_words(config, key, types, *allowed)
    return types


def _mamba2(config: Config, *, width: int | None = None, gated_norm: bool = True, bias: bool | None = None) -> Mamba2:
    """Return Mamba-2 of the keys mamba_n_heads ...; inside it is `width` or mamba_expand times m wide."""
    inner = width or config.multiple("mamba_expand", default=2, of=config.integer("hidden_size"))
    heads, groups = config.integer("mamba_n_heads"), config.integer("mamba_n_groups")
    head_dim = inner // heads if config.value("mamba_d_head") == "auto" else config.integer("mamba_d_head")
    if heads * head_dim != inner:
        problem = f"mamba_n_heads {heads} x mamba_d_head {head_dim} is not the inner width {inner:,}"
        raise config.error(problem, "mamba_n_heads")
    if heads % groups:
        raise config.error(f"mamba_n_groups {groups} does not divide the {heads} heads", "mamba_n_groups")
    return Mamba2(
        heads=heads,
        head_dim=head_dim,
        state_dim=config.integer("mamba_d_state"),
        groups=groups,
        conv_size=config.integer("mamba_d_conv", high=MAX_WIDTH),
        conv_bias=config.boolean("mamba_conv_bias", True),
        bias=config.boolean("mamba_proj_bias", False) if bias is None else bias,
        gated_norm=gated_norm,
        chunk_size=config.integer("mamba_chunk_size", default=256),
    )


def bamba(config: Config, name: str) -> ModelSpec:
    """Bamba: Mamba-2, attention in the layers that attn_layer_indices names, and a gated MLP in every layer."""
    attends = set(config.integers("attn_layer_indices"))
    softmax = Layer(mixer=parts.attention(config, bias=config.boolean("attention_bias", False)), ffn=parts.mlp(config))
    mamba = Layer(mixer=_mamba2(config), ffn=parts.mlp(config))
    return parts.assemble(config, name, [softmax if i in attends else mamba for i in range(config.layer_count)])


def granite_hybrid(config: Config, name: str) -> ModelSpec:
    """Granite 4: Mamba-2 or attention in each layer; a shared MLP, and experts beside it if there are any."""
    key = "layer_types" if config.has("layer_types") else "layers_block_type"
    types = _types(config, key, [MAMBA] * config.layer_count, MAMBA, ATTENTION)
    experts, shared = config.integer("num_local_experts", low=0), config.integer("shared_intermediate_size")
    ffn: AnyFFN = MLP(intermediate_size=shared)
    if experts:
        ffn = MoE(
            experts=experts,
            top_k=parts.experts_chosen(config, experts),
            intermediate_size=config.integer("intermediate_size"),
            shared_intermediate_size=shared,
        )
    softmax = Layer(mixer=parts.attention(config, bias=config.boolean("attention_bias", False)), ffn=ffn)
    mamba = Layer(mixer=_mamba2(config), ffn=ffn)
    return parts.assemble(config, name, [softmax if kind == ATTENTION else mamba for kind in types])


def falcon_h1(config: Config, name: str) -> ModelSpec:
    """Falcon-H1: Mamba-2 and attention read one norm and add up, then an MLP follows.

    Here that is two layers for one of the file. The first has Mamba-2 alone and no norm, as the two share one.
    """
    biased, projected = config.boolean("mamba_proj_bias", False), config.boolean("projectors_bias", False)
    width = config.optional_integer("mamba_d_ssm")
    mamba = _mamba2(config, width=width, gated_norm=config.boolean("mamba_rms_norm", False), bias=False)
    extras = []
    if biased:
        inner, state = mamba.inner_size, 2 * mamba.groups * mamba.state_dim
        extras.append(Extra(name="biases", elements=2 * inner + state + mamba.heads))
    if projected:
        extras.append(Extra(name="biases", vectors=1))
    pair = (
        Layer(mixer=mamba, norms=0, extras=tuple(extras)),
        Layer(mixer=parts.attention(config, bias=config.boolean("attention_bias", False)), ffn=parts.mlp(config)),
    )
    config.note("each layer of the file is two here: Mamba-2, and attention beside it with the MLP")
    return parts.assemble(config, name, list(pair) * config.layer_count)


APRIEL_SSM = {"d_state": 64, "d_conv": 4, "d_inner": 4096}
"""What Apriel-H1's code sets in ssm_cfg where a file leaves it out (configuration_apriel_hybrid_ssm.py)."""


def apriel_hybrid(config: Config, name: str) -> ModelSpec:
    """Apriel-H1: attention (t) or Mamba (m2) in each layer of hybrid_block_layout, and Mistral's MLP in all.

    The Mamba layers stand in the place of attention's heads: their input and B have the features of its values and
    keys (d_xb), their gate and C those of its queries (d_inner).
    """
    words = config.strings("hybrid_block_layout") or []
    layout = words * config.layer_count if len(words) == 1 else words
    if len(layout) != config.layer_count or set(layout) - {"t", "m2"}:
        problem = (
            f"hybrid_block_layout must say t or m2 (no other block is read) for each of {config.layer_count} layers"
        )
        raise config.error(problem, "hybrid_block_layout")
    mlp = MLP(intermediate_size=config.integer("intermediate_size"))
    by_kind = {"t": Layer(mixer=parts.attention(config, bias=False), ffn=mlp)}
    if "m2" in layout:
        by_kind["m2"] = Layer(mixer=_apriel_mamba(config), ffn=mlp)
    return parts.assemble(config, name, [by_kind[kind] for kind in layout])


def _apriel_mamba(config: Config) -> Mamba1:
    hidden, own = config.integer("hidden_size"), config.nested("ssm_cfg")
    if own is None:
        raise config.error("ssm_cfg is missing, and m2 layers need it", "hybrid_block_layout")
    own.complete(APRIEL_SSM, {})
    for key in ("repeat_kv_before_conv", "dt_proj_bias"):
        if not own.boolean(key, True):
            raise own.error(f"{key} false is not supported: no published Apriel-H1 has it", key)
    return Mamba1(
        inner_size=own.integer("d_inner"),
        dt_rank=step_rank(own, "dt_rank", hidden),
        state_dim=own.integer("d_state"),
        conv_size=own.integer("d_conv", high=MAX_WIDTH),
        conv_bias=own.boolean("conv_bias", True),
        bias=own.boolean("bias", False),
        shared_size=own.integer("d_xb", default=hidden),
    )


def _shared_block(config: Config, mlp: MLP) -> Layer:
    """Return the attention and MLP that hybrid layers share.

    The attention reads the stream and the first embedding, 2m in all. The projections of that other half are its
    extras. One of its norms is 2m wide, and one m.
    """
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    kv_heads = config.optional_integer("num_key_value_heads") or heads
    config.check_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    config.derived("attention_hidden_size", 2 * hidden, "hidden_size")
    dim = config.optional_integer("attention_head_dim") or 2 * hidden // heads
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=dim)
    half = Extra(name="projections of the first embedding", vectors=(heads + 2 * kv_heads) * dim, matmul=True)
    return Layer(mixer=attention, ffn=mlp, extras=(half,), norms=3)


def _zamba(
    config: Config, name: str, types: list[str], mamba: Layer, shared: list[Layer], own: Extra | None
) -> ModelSpec:
    """Return the layers of `types`; a hybrid one is the next block of `shared`, then Mamba with what is its `own`."""
    if not config.boolean("tie_word_embeddings", True):
        problem = f"tie_word_embeddings false is not supported: {config.family} would not share its blocks either"
        raise config.error(problem, "tie_word_embeddings")
    hidden = config.integer("hidden_size")
    projection = Extra(name="projection of the shared block", vectors=hidden, matmul=True)
    after = replace(mamba, extras=(projection, *((own,) if own else ())))
    layers, used = [], 0
    for kind in types:
        if kind == HYBRID:
            block = shared[used % len(shared)]
            layers.append(replace(block, tied=used >= len(shared)))
            used += 1
        layers.append(after if kind == HYBRID else mamba)
    config.note("each hybrid layer of the file is two here: the block that such layers share, and Mamba")
    return parts.assemble(config, name, layers)


def zamba(config: Config, name: str) -> ModelSpec:
    """Zamba: Mamba, and one block of attention and MLP before some of its layers, the same weights each time."""
    period, offset = config.integer("attn_layer_period"), config.integer("attn_layer_offset", low=0)
    later = [HYBRID if index % period == offset else MAMBA for index in range(config.layer_count - 3)]
    types = _types(config, "layers_block_type", [MAMBA, MAMBA, HYBRID, *later], MAMBA, HYBRID)
    config.integer("n_mamba_heads")  # Heads split its projections of step size, B and C, and change no count.
    mamba = Layer(mixer=mamba1(config, config.integer("hidden_size"), MAMBA_KEYS), norms=1)
    mlp = MLP(intermediate_size=config.integer("intermediate_size"))
    return _zamba(config, name, types, mamba, [_shared_block(config, mlp)], None)


def zamba2(config: Config, name: str) -> ModelSpec:
    """Zamba 2: Mamba-2, and num_mem_blocks shared blocks in turn, each time with adapters of its own for the MLP."""
    config.refuse("use_shared_attention_adapter", "adapters of the shared attention are not read")
    hidden = config.integer("hidden_size")
    default = [MAMBA, *[*[MAMBA] * 5, HYBRID] * 7, *[MAMBA] * 4, HYBRID, *[MAMBA] * 3, HYBRID, *[MAMBA] * 2]
    types = _types(config, "layers_block_type", default, MAMBA, HYBRID)
    hybrid = [index for index, kind in enumerate(types) if kind == HYBRID]
    config.derived("hybrid_layer_ids", hybrid, "layers_block_type")
    heads, groups = config.integer("n_mamba_heads"), config.integer("mamba_ngroups")
    inner, bias = config.multiple("mamba_expand", default=2, of=hidden), config.boolean("add_bias_linear", False)
    if inner % heads or heads % groups:
        problem = f"n_mamba_heads {heads} does not divide the inner width {inner:,}, or mamba_ngroups not the heads"
        raise config.error(problem, "n_mamba_heads")
    mixer = Mamba2(
        heads=heads,
        head_dim=inner // heads,
        state_dim=config.integer("mamba_d_state"),
        groups=groups,
        conv_size=config.integer("mamba_d_conv", high=MAX_WIDTH),
        bias=bias,
        chunk_size=config.integer("chunk_size", default=256),
    )
    width, rank = config.optional_integer("intermediate_size") or 4 * hidden, config.integer("adapter_rank")
    adapter = Extra(name="adapter", vectors=rank, elements=2 * rank * width, matmul=True)
    mlp = MLP(intermediate_size=width, bias=bias)
    shared = [_shared_block(config, mlp)] * config.integer("num_mem_blocks")
    return _zamba(config, name, types, Layer(mixer=mixer, norms=1), shared, adapter)


ZAMBA2 = frozenset({"kv_channels", "mamba_headdim", "num_query_groups", "use_conv_bias"})
"""Keys of Zamba 2 that follow from others, and use_conv_bias, which its code does not read."""

APRIEL = keys("activation chunk_size dt_init dt_init_floor dt_max dt_min dt_scale expand n_qk_heads n_v_heads")
"""Keys of ssm_cfg that belong to other blocks, to the start of training, or to what d_inner says."""

FAMILIES: dict[str, Family] = {
    "apriel_hybrid_ssm": Family(apriel_hybrid, like="mistral", inert=APRIEL),
    "apriel_ssm_thinker_hybrid": Family(apriel_hybrid, like="mistral", inert=APRIEL),
    "bamba": Family(bamba),
    "falcon_h1": Family(falcon_h1, inert=frozenset({"mamba_expand"})),
    "granitemoehybrid": Family(granite_hybrid, inert=frozenset({"position_embedding_type"})),
    "zamba": Family(zamba),
    "zamba2": Family(zamba2, inert=ZAMBA2),
}
"""Reader by model_type."""
