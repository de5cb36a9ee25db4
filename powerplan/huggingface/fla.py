"""Families of flash-linear-attention (fla), whose config.json transformers reads once fla is imported.

Defaults are those of fla 0.6.0; parameter counts were compared with the models that it builds (scripts/fla_counts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from msgspec.structs import asdict

from powerplan import mixers
from powerplan.ffn import MLP
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.mamba import mamba2_mixer
from powerplan.huggingface.parts import assemble
from powerplan.mixers import AnyMixer, Attention
from powerplan.part import MAX_WIDTH
from powerplan.spec import Layer, ModelSpec, Norm


def _ffn(config: Config, hidden: int) -> MLP:
    """fla's gated MLP: two thirds of hidden_ratio times the width, up to a multiple of 256."""
    width = config.optional_integer("intermediate_size")
    if width is None:
        ratio = config.multiple("hidden_ratio", default=config.defaults.get("hidden_ratio", 4), of=1)
        width = -(-int(hidden * ratio * 2 / 3) // 256) * 256
    return MLP(intermediate_size=width)


def _expanded_heads(config: Config, *, reads_kv_heads: bool = False, **expansions: float) -> dict[str, Any]:
    """Return heads and head dims from two expansions of the width, for keys and for values, given with their defaults.

    Mixers that read num_kv_heads keep a state for each head all the same, so that it may not differ from num_heads.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_heads")
    if reads_kv_heads and config.optional_integer("num_kv_heads") not in (None, heads):
        problem = "num_kv_heads other than num_heads is not supported: the state is one per head"
        raise config.error(problem, "num_kv_heads")
    fields = {"heads": heads}
    for field, (name, default) in zip(("head_dim", "v_head_dim"), expansions.items(), strict=True):
        total = config.multiple(name, default=default, of=hidden)
        if total % heads:
            raise config.error(f"{name} gives {total:,} features, no multiple of num_heads {heads}", name)
        fields[field] = total // heads
    return fields


def _convolution(config: Config, default: bool) -> int:
    return config.integer("conv_size", default=4, high=MAX_WIDTH) if config.boolean("use_short_conv", default) else 0


def _attention(config: Config, hidden: int) -> dict[int, Attention]:
    """Return the softmax layers of a hybrid by position: `attn`, one object or a list of them, with their layers."""
    stated = config.data.get("attn")
    if stated is None:
        return {}
    if not isinstance(stated, (dict, list)) or (isinstance(stated, list) and len(stated) > config.layer_count):
        raise config.error("attn must be an object, or a list of objects", "attn")
    by_layer: dict[int, Attention] = {}
    for index in range(len(stated)) if isinstance(stated, list) else (None,):
        path = ("attn",) if index is None else ("attn", index)
        if not isinstance(stated if index is None else stated[index], dict):
            raise config.error("attn must be an object, or a list of objects", *path)
        part = config.part(*path)
        heads = part.integer("num_heads")
        part.check_divides("num_heads", heads, "hidden_size", hidden)
        attention = Attention(
            heads=heads,
            kv_heads=part.integer("num_kv_heads", default=heads),
            head_dim=hidden // heads,
            bias="qkv" if part.boolean("qkv_bias", False) else False,
            window=part.optional_integer("window_size"),
        )
        for layer in part.integers("layers"):
            if not 0 <= layer < config.layer_count:
                raise part.error(f"there is no layer {layer}; allowed are 0 to {config.layer_count - 1}", "layers")
            if layer in by_layer:
                raise part.error(f"layer {layer} is given twice", "layers")
            by_layer[layer] = attention
    return by_layer


def _model(mixer_of: Callable[[Config], AnyMixer], config: Config, name: str) -> ModelSpec:
    """Return a model of one mixer and a gated MLP in every layer but those that `attn` names."""
    mixer = mixer_of(config)
    config.refuse("attnres_block_size", "attention over residuals is not read")
    hidden = config.integer("hidden_size")
    ffn, softmax = _ffn(config, hidden), _attention(config, hidden)
    linear = Layer(mixer=mixer, ffn=ffn)
    layers = [Layer(mixer=softmax[i], ffn=ffn) if i in softmax else linear for i in range(config.layer_count)]
    return assemble(config, name, layers)


def _gla(config: Config) -> AnyMixer:
    return mixers.GLA(
        **_expanded_heads(config, reads_kv_heads=True, expand_k=0.5, expand_v=1.0),
        conv_size=_convolution(config, False),
        output_gate=config.boolean("use_output_gate", True),
        output_norm="head" if config.boolean("elementwise_affine", True) else "none",
    )


def _retnet(config: Config) -> AnyMixer:
    """RetNet; its model does not hand use_short_conv on to the layer."""
    return mixers.RetNet(
        **_expanded_heads(config, reads_kv_heads=True, expand_k=1.0, expand_v=2.0),
        output_gate=config.boolean("use_output_gate", True),
        output_norm="head" if config.boolean("elementwise_affine", True) else "none",
    )


def _delta_net(config: Config) -> AnyMixer:
    if not config.boolean("use_beta", True):
        raise config.error("use_beta false is not supported: the delta rule here has a learning rate", "use_beta")
    return mixers.DeltaNet(
        **_expanded_heads(config, expand_k=1.0, expand_v=1.0),
        conv_size=_convolution(config, True),
        output_gate=config.boolean("use_gate", False),
    )


def _value_heads(config: Config, expand: float) -> dict[str, Any]:
    """Return the heads of gated DeltaNet and KDA: states per value head, expand_v times head_dim wide."""
    keys = config.integer("num_heads")
    heads = config.integer("num_v_heads", default=keys)
    if heads % keys:
        raise config.error(f"num_v_heads {heads} is not a multiple of num_heads {keys}", "num_v_heads")
    dim = config.integer("head_dim")
    v_dim = config.multiple("expand_v", default=expand, of=dim)
    conv_size = _convolution(config, True)
    return {"heads": heads, "key_heads": keys, "head_dim": dim, "v_head_dim": v_dim, "conv_size": conv_size}


def _gated_deltanet(config: Config) -> AnyMixer:
    return mixers.GatedDeltaNet(**_value_heads(config, 2.0), output_gate=config.boolean("use_gate", True))


def _kda(config: Config) -> AnyMixer:
    """Kimi delta attention; unlike Kimi Linear's, fla's output gate has biases."""
    return mixers.KDA(**_value_heads(config, 1.0), gate_bias=True)


def _gsa(config: Config) -> AnyMixer:
    """Gated slot attention; the misspelt expansions are fla's own."""
    if config.data.get("feature_map", "swish") == "t2r":
        raise config.error("feature_map t2r is not supported: it has parameters", "feature_map")
    key = "expand_k" if config.has("expand_k") else "exapnd_k"
    value = "expand_v" if config.has("expand_v") else "exapnd_v"
    fields = _expanded_heads(config, reads_kv_heads=True, **{key: 1.0, value: 1.0})
    return mixers.GSA(
        **fields,
        slots=config.optional_integer("num_slots") or fields["head_dim"],
        conv_size=_convolution(config, False),
        output_norm="full" if config.boolean("elementwise_affine", True) else "none",
    )


def rwkv7(config: Config, name: str) -> ModelSpec:
    """RWKV-7: no value residual in the first layer, a norm behind the embedding, a token shift before each FFN.

    fla's own files give value_dim per layer; the ranks have no default here, as the published files state them.
    """
    hidden, count = config.integer("hidden_size"), config.layer_count
    dim = config.optional_integer("head_dim")
    heads = config.integer("num_heads", default=hidden // (dim or 64) or 1)
    dim = dim or hidden // heads
    if heads * dim != hidden:
        raise config.error(f"hidden_size {hidden} is not num_heads {heads} x head_dim {dim}", "hidden_size")
    ranks: dict[str, Any] = {
        "decay_rank": config.integer("decay_low_rank_dim"),
        "rate_rank": config.integer("a_low_rank_dim"),
        "gate_rank": config.integer("gate_low_rank_dim"),
    }
    value_rank = config.integer("v_low_rank_dim")
    widths = _value_dims(config, hidden, count)
    if _attention(config, hidden):
        raise config.error("attn is not supported for rwkv7: its FFN keeps a token shift", "attn")
    width = config.optional_integer("intermediate_size")
    width = width or -(-config.multiple("hidden_ratio", default=4, of=hidden) // 32) * 32
    ffn = MLP(intermediate_size=width, gated=False)
    layers = []
    for index, width in enumerate(widths):
        rank = value_rank if index else None
        mixer = mixers.RWKV7(heads=heads, head_dim=dim, v_head_dim=width // heads, value_rank=rank, **ranks)
        layers.append(Layer(mixer=mixer, ffn=ffn))
    first = config.boolean("norm_first", True)
    norm = Norm(kind="layernorm", embedding=first, bias=config.boolean("norm_bias", True))
    return assemble(config, name, layers, norm=norm)


def _value_dims(config: Config, hidden: int, count: int) -> list[int]:
    per_layer = isinstance(config.data.get("value_dim"), list)
    dims = config.integers("value_dim") if per_layer else [config.integer("value_dim", default=hidden)] * count
    if len(dims) != count or any(dim < hidden or dim % hidden for dim in dims):
        problem = f"value_dim must be a multiple of hidden_size {hidden} for each of {count} layers"
        raise config.error(problem, "value_dim")
    return dims


def _softmax_heads(config: Config) -> dict[str, Any]:
    hidden, heads = config.integer("hidden_size"), config.integer("num_heads")
    has_head_dim = "head_dim" in config.defaults
    if not has_head_dim:
        config.check_divides("num_heads", heads, "hidden_size", hidden)
    kv_heads = config.integer("num_kv_heads", default=heads)
    config.check_divides("num_kv_heads", kv_heads, "num_heads", heads)
    dim = config.integer("head_dim") if has_head_dim else hidden // heads
    bias = "qkv" if config.boolean("qkv_bias", False) else False
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "bias": bias}


def _transformer(config: Config) -> AnyMixer:
    """fla's plain Transformer."""
    return Attention(
        **_softmax_heads(config),
        qk_norm="head" if config.boolean("qk_norm", False) else "none",
        window=config.optional_integer("window_size"),
    )


def _forgetting_transformer(config: Config) -> AnyMixer:
    """The Forgetting Transformer; its query and key norms have a weight for each feature of all heads."""
    return mixers.Forgetting(
        **_softmax_heads(config),
        qk_norm="full" if config.boolean("qk_norm", False) else "none",
        window=config.optional_integer("window_size"),
        output_gate=config.boolean("use_output_gate", False),
    )


def _nsa(config: Config) -> AnyMixer:
    """Native sparse attention as fla has it: blocks of one size, compressed without overlap, and picked."""
    block = config.integer("block_size", default=64)
    fields = _softmax_heads(config)
    if "num_kv_heads" not in config.data:
        fields["kv_heads"] = 4
    return mixers.NSA(
        **fields,
        compress_size=block,
        compress_stride=block,
        select_size=block,
        select_count=config.integer("block_counts", default=16),
        window=config.integer("window_size", default=512),
    )


def _moba(config: Config) -> AnyMixer:
    """Mixture of block attention; fla normalises each head's output."""
    config.refuse("window_size", "MoBA's blocks are not in a window")
    config.refuse("use_output_gate", "MoBA's low-rank gate is not read")
    return mixers.MoBA(
        **_softmax_heads(config),
        qk_norm="head" if config.boolean("qk_norm", False) else "none",
        block_size=config.integer("moba_chunk_size", default=256),
        top_k=config.integer("moba_topk", default=4),
        output_norm=True,
    )


def _log_linear_mamba2(config: Config) -> AnyMixer:
    """Log-linear attention over Mamba-2, with 15 levels."""
    return mixers.LogLinear(**asdict(mamba2_mixer(config, default_chunk=64)))


FAMILIES: dict[str, Family] = {
    "delta_net": Family(partial(_model, _delta_net), defaults={"num_heads": 16}),
    "forgetting_transformer": Family(partial(_model, _forgetting_transformer), defaults={"num_heads": 32}),
    "gated_deltanet": Family(partial(_model, _gated_deltanet), defaults={"num_heads": 6, "head_dim": 256}),
    "gla": Family(partial(_model, _gla), defaults={"num_heads": 4}),
    "gsa": Family(partial(_model, _gsa), defaults={"num_heads": 4, "num_slots": 64}),
    "kda": Family(partial(_model, _kda), defaults={"num_heads": 16, "head_dim": 128}),
    "log_linear_mamba2": Family(partial(_model, _log_linear_mamba2), defaults={"n_groups": 1}),
    "moba": Family(partial(_model, _moba), defaults={"num_heads": 32}),
    "nsa": Family(partial(_model, _nsa), defaults={"num_heads": 64, "head_dim": 32}),
    "retnet": Family(partial(_model, _retnet), defaults={"num_heads": 8, "hidden_ratio": 2}),
    "rwkv7": Family(rwkv7, defaults={"head_dim": 64}),
    "transformer": Family(partial(_model, _transformer), defaults={"num_heads": 32}),
}
"""Reader by model_type. fla's mamba and mamba2 share their names, and most of their keys, with transformers'."""
