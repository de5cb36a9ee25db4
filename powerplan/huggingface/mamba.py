"""Families of state space models: Mamba, Mamba-2 in two forms of config, Jamba, Nemotron-H."""

from __future__ import annotations

from powerplan.errors import shown
from powerplan.extras import Extra
from powerplan.ffn import MLP, MoE
from powerplan.huggingface.config import MAX_CONFIG_LAYERS, Config, Family, keys
from powerplan.huggingface.parts import assemble, attention, experts_chosen, look_up, note_prediction_layers
from powerplan.mixers import AnyMixer, Mamba1, Mamba2
from powerplan.part import MAX_WIDTH
from powerplan.spec import Layer, ModelSpec, Norm, group_layers


def mamba1(
    config: Config, hidden: int, keys: tuple[str, ...], inner_norms: bool = False, inner_key: str | None = None
) -> Mamba1:
    """Return the mixer of `keys`: expansion, rank of the step size, state, convolution, its bias, projections' bias."""
    expand, rank, state, conv, conv_bias, bias = keys
    inner = config.multiple(expand, default=2, of=hidden)
    return Mamba1(
        inner_size=inner if inner_key is None else config.integer(inner_key, default=inner),
        dt_rank=step_rank(config, rank, hidden),
        state_dim=config.integer(state, default=16),
        conv_size=config.integer(conv, default=4, high=MAX_WIDTH),
        conv_bias=config.boolean(conv_bias, True),
        bias=config.boolean(bias, False),
        inner_norms=inner_norms,
    )


def step_rank(config: Config, key: str, hidden: int) -> int:
    """Return the rank of Mamba's step size; "auto" is a sixteenth of the hidden size, rounded up."""
    return -(-hidden // 16) if config.data.get(key, "auto") == "auto" else config.integer(key)


def mamba(config: Config, name: str) -> ModelSpec:
    """Mamba as transformers has it: a mixer and a norm per layer, tied. intermediate_size, if stated, is its width."""
    keys = ("expand", "time_step_rank", "state_size", "conv_kernel", "use_conv_bias", "use_bias")
    mixer = mamba1(config, config.integer("hidden_size", "d_model"), keys, inner_key="intermediate_size")
    return assemble(config, name, [Layer(mixer=mixer)] * config.layer_count, norm=Norm(per_layer=1), tie=True)


def _mamba2(
    config: Config,
    keys: tuple[str, ...],
    heads: int,
    head_dim: int,
    *,
    gated_norm: bool = True,
    default_chunk: int = 256,
) -> Mamba2:
    """Return the mixer from `keys`: state, groups, convolution, its bias, projections' bias, chunk size."""
    state, groups_key, conv, conv_bias, bias, chunk = keys
    state_dim, groups = config.integer(state, default=128), config.integer(groups_key)
    if heads % groups:
        raise config.error(f"{groups_key} {groups} does not divide the {heads} heads", groups_key)
    return Mamba2(
        heads=heads,
        head_dim=head_dim,
        state_dim=state_dim,
        groups=groups,
        conv_size=config.integer(conv, default=4, high=MAX_WIDTH),
        conv_bias=config.boolean(conv_bias, True),
        bias=config.boolean(bias, False),
        gated_norm=gated_norm,
        chunk_size=config.integer(chunk, default=default_chunk),
    )


def mamba2(config: Config, name: str) -> ModelSpec:
    """Mamba-2 as transformers and flash-linear-attention have it: a mixer and a norm per layer."""
    layer = Layer(mixer=mamba2_mixer(config))
    return assemble(config, name, [layer] * config.layer_count, norm=Norm(per_layer=1))


def mamba2_mixer(config: Config, default_chunk: int = 256) -> Mamba2:
    """Return the mixer. num_heads may be left out, as by flash-linear-attention, but must agree with the width."""
    config.refuse("D_has_hdim", "only one D per head is read")
    hidden = config.integer("hidden_size")
    inner, head_dim = config.multiple("expand", default=2, of=hidden), config.integer("head_dim", default=64)
    heads = config.integer("num_heads") if config.has("num_heads") else inner // head_dim or 1
    if heads * head_dim != inner:
        key = "num_heads" if config.has("num_heads") else "head_dim"
        raise config.error(f"num_heads {heads} x head_dim {head_dim} is not the inner width {inner:,}", key)
    keys = ("state_size", "n_groups", "conv_kernel", "use_conv_bias", "use_bias", "chunk_size")
    norm = config.boolean("rmsnorm", True)
    return _mamba2(config, keys, heads, head_dim, gated_norm=norm, default_chunk=default_chunk)


def mamba_ssm(config: Config, name: str) -> ModelSpec:
    """The original files of state-spaces/mamba, which have no model_type: d_model, n_layer, and ssm_cfg for the layer.

    The vocabulary is padded to a multiple of pad_vocab_size_multiple; embeddings are tied.
    """
    config.refuse("d_intermediate", "an MLP in every layer is not read")
    config.refuse("attn_layer_idx", "attention layers are not read")
    ssm = config.nested("ssm_cfg") or config
    hidden = config.integer("d_model")
    inner = ssm.multiple("expand", default=2, of=hidden)
    kind = ssm.data.get("layer", "Mamba1") if ssm is not config else "Mamba1"
    mixer: AnyMixer
    if kind == "Mamba2":
        for key in ("d_ssm", "D_has_hdim"):
            ssm.refuse(key, "only Mamba-2 over its whole inner width is read")
        head_dim = ssm.integer("headdim", default=64)
        if inner % head_dim:
            raise ssm.error(f"headdim {head_dim} does not divide the inner width {inner:,}", "headdim")
        keys = ("d_state", "ngroups", "d_conv", "conv_bias", "bias", "chunk_size")
        mixer = _mamba2(ssm, keys, inner // head_dim, head_dim, gated_norm=ssm.boolean("rmsnorm", True))
    elif kind == "Mamba1":
        mixer = mamba1(ssm, hidden, ("expand", "dt_rank", "d_state", "d_conv", "conv_bias", "bias"))
    else:
        raise ssm.error(f"layer {shown(kind)} is not supported; allowed are Mamba1, Mamba2", "layer")
    multiple = config.integer("pad_vocab_size_multiple", default=8)
    layers = config.integer("n_layer", high=MAX_CONFIG_LAYERS)
    return ModelSpec(
        name=name,
        vocab_size=-(-config.integer("vocab_size") // multiple) * multiple,
        hidden_size=hidden,
        tie_embeddings=config.boolean("tie_embeddings", True),
        norm=Norm(kind="rmsnorm" if config.boolean("rms_norm", True) else "layernorm", per_layer=1),
        layers=group_layers([Layer(mixer=mixer)] * layers),
    )


MAMBA_KEYS = tuple(f"mamba_{key}" for key in ("expand", "dt_rank", "d_state", "d_conv", "conv_bias", "proj_bias"))
"""Keys of Jamba and Zamba."""


def jamba(config: Config, name: str) -> ModelSpec:
    """Jamba: Mamba with norms inside, attention in one layer of a period, experts in every other."""
    hidden, count = config.integer("hidden_size"), config.layer_count
    mixer = mamba1(config, hidden, MAMBA_KEYS, inner_norms=True)
    softmax = attention(config)
    experts = config.integer("num_experts", "num_local_experts")
    width = config.integer("intermediate_size")
    moe = MoE(experts=experts, top_k=experts_chosen(config, experts), intermediate_size=width)
    dense = MLP(intermediate_size=width)
    attends = _every(config, count, "attn_layer", 8, 4)
    sparse = _every(config, count, "expert_layer", 2, 1)
    layers = [
        Layer(mixer=softmax if attends[index] else mixer, ffn=moe if sparse[index] and experts > 1 else dense)
        for index in range(count)
    ]
    return assemble(config, name, layers)


def _every(config: Config, count: int, key: str, default_period: int, default_offset: int) -> list[bool]:
    """Return which of `count` layers are of the kind that stands once in each period, at an offset."""
    period = config.integer(f"{key}_period", default=default_period)
    offset = config.integer(f"{key}_offset", default=default_offset, low=0)
    if offset >= period:
        raise config.error(f"{key}_offset {offset} is not less than {key}_period {period}", f"{key}_offset")
    return [index % period == offset for index in range(count)]


_BLOCKS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_BLOCK_NAMES = {"linear_attention": "mamba", "full_attention": "attention"} | {kind: kind for kind in _BLOCKS.values()}


def nemotron_h(config: Config, name: str) -> ModelSpec:
    """Nemotron-H: each layer is one block behind one norm: Mamba-2 (M), attention (*), an MLP (-) or experts (E).

    With moe_latent_size, routed experts work on that many features, as in Nemotron 3 Super.
    """
    note_prediction_layers(config, "num_nextn_predict_layers")
    bias = config.boolean("mlp_bias", False)
    kinds = _blocks(config)
    by_kind: dict[str, Layer] = {}
    for kind in dict.fromkeys(kinds):
        if kind == "mamba":
            by_kind[kind] = Layer(mixer=_nemotron_mamba(config))
        elif kind == "attention":
            by_kind[kind] = Layer(mixer=attention(config))
        elif kind == "mlp":
            width = config.integer("intermediate_size", default=21_504)
            by_kind[kind] = Layer(ffn=MLP(intermediate_size=width, gated=False, bias=bias))
        else:
            experts = config.integer("n_routed_experts", "num_local_experts")
            moe = MoE(
                experts=experts,
                top_k=experts_chosen(config, experts),
                intermediate_size=config.integer("moe_intermediate_size", default=7688),
                shared_intermediate_size=config.integer("moe_shared_expert_intermediate_size", default=7688),
                gated=False,
                router_bias=True,
                latent_size=config.optional_integer("moe_latent_size"),
            )
            by_kind[kind] = Layer(ffn=moe, extras=_nemotron_biases(moe) if bias else ())
    return assemble(config, name, [by_kind[kind] for kind in kinds], ties=False, norm=Norm(per_layer=1))


def _nemotron_biases(moe: MoE) -> tuple[Extra, ...]:
    """Return the biases of mlp_bias in a layer with experts: the shared expert's, and those to and from the latent."""
    latent, width = moe.latent_size or 0, moe.shared_intermediate_size
    return (Extra(name="shared expert and latent biases", vectors=2 if latent else 1, elements=width + latent),)


def _nemotron_mamba(config: Config) -> Mamba2:
    heads, head_dim = config.integer("mamba_num_heads", default=128), config.integer("mamba_head_dim", default=64)
    look_up(config, "n_groups", "conv_kernel", "use_conv_bias", "chunk_size")  # each has a name that goes before it
    groups = "mamba_n_groups" if config.has("mamba_n_groups") else "n_groups"
    conv_bias = "mamba_conv_bias" if config.has("mamba_conv_bias") else "use_conv_bias"
    conv, chunk = config.key("mamba_d_conv", "conv_kernel"), config.key("mamba_chunk_size", "chunk_size")
    keys = ("ssm_state_size", groups, conv, conv_bias, "use_bias", chunk)
    return _mamba2(config, keys, heads, head_dim, default_chunk=128)


def _blocks(config: Config) -> list[str]:
    """Return each layer's kind, from layers_block_type or from the letters of hybrid_override_pattern."""
    names = config.strings("layers_block_type" if config.has("layers_block_type") else "layer_types")
    if names is not None:
        for name in names:
            if name not in _BLOCK_NAMES:
                allowed = ", ".join(sorted(_BLOCK_NAMES))
                problem = f"{shown(name)} is not a block of Nemotron-H; allowed are {allowed}"
                raise config.error(problem, "layers_block_type")
        _note_other_count(config, len(names))
        return [_BLOCK_NAMES[name] for name in names]
    pattern = config.data.get("hybrid_override_pattern")
    if pattern is None:
        raise config.error("nemotron_h needs hybrid_override_pattern or layers_block_type, and the file has neither")
    if not isinstance(pattern, str) or not pattern or set(pattern) - set(_BLOCKS) or len(pattern) > MAX_CONFIG_LAYERS:
        problem = f"hybrid_override_pattern must be a word of M, *, - and E, and is {shown(pattern)}"
        raise config.error(problem, "hybrid_override_pattern")
    _note_other_count(config, len(pattern))
    return [_BLOCKS[letter] for letter in pattern]


def _note_other_count(config: Config, count: int) -> None:
    stated = config.optional_integer("num_hidden_layers")
    if stated is not None and stated != count:
        config.note(f"num_hidden_layers {stated} is not read: the file names {count} layers")


NEMOTRON_KEYS = keys(
    """
    attention_bias intermediate_size mamba_head_dim mamba_num_heads moe_intermediate_size moe_latent_size
    moe_shared_expert_intermediate_size mtp_hybrid_override_pattern mtp_layers_block_type n_routed_experts
    n_shared_experts num_experts_per_tok time_step_rank
    """
)
"""Keys of blocks that a file may have none of, and attention_bias, which no code reads."""

FAMILIES: dict[str, Family] = {
    "falcon_mamba": Family(mamba),
    "jamba": Family(jamba),
    "mamba": Family(mamba),
    "mamba2": Family(mamba2, inert=frozenset({"time_step_rank"})),
    "nemotron_h": Family(nemotron_h, inert=NEMOTRON_KEYS, aliases={"head_dim": "attention_head_dim"}),
}
"""Reader by model_type."""
