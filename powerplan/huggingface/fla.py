"""Families of flash-linear-attention (fla), whose config.json transformers reads once fla is imported.

Defaults are those of fla 0.6.0; parameter counts were compared with the models that it builds (scripts/fla_counts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from powerplan.ffn import MLP
from powerplan.huggingface.config import Config
from powerplan.huggingface.mamba import mamba2_mixer
from powerplan.huggingface.parts import assemble
from powerplan.mixers import (
    GLA,
    GSA,
    KDA,
    NSA,
    RWKV7,
    AnyMixer,
    Attention,
    DeltaNet,
    Forgetting,
    GatedDeltaNet,
    LogLinear,
    MoBA,
    RetNet,
)
from powerplan.spec import Layer, ModelSpec, Norm


def _ffn(config: Config, hidden: int, default_ratio: int) -> MLP:
    """fla's gated MLP: two thirds of hidden_ratio times the width, up to a multiple of 256."""
    width = config.optional_integer("intermediate_size")
    if width is None:
        ratio = config.data.get("hidden_ratio")
        config.multiple("hidden_ratio", default=default_ratio, of=1)
        width = -(-int(hidden * (default_ratio if ratio is None else ratio) * 2 / 3) // 256) * 256
    return MLP(intermediate_size=width)


def _head_dims(
    config: Config, hidden: int, heads: int, key: tuple[str, float], value: tuple[str, float]
) -> dict[str, Any]:
    """Return head dims from the expansions of the width for keys and values; (name, default) each."""
    dims: dict[str, Any] = {}
    for field, (name, default) in (("head_dim", key), ("v_head_dim", value)):
        total = config.multiple(name, default=default, of=hidden)
        if total % heads:
            raise config.error(f"{name} gives {total:,} features, no multiple of num_heads {heads}", name)
        dims[field] = total // heads
    return dims


def _convolution(config: Config, default: bool) -> int:
    return config.integer("conv_size", default=4, high=1024) if config.boolean("use_short_conv", default) else 0


def _affine(config: Config) -> bool:
    return config.boolean("elementwise_affine", True)


def _no_grouping(config: Config, heads: int) -> None:
    if config.optional_integer("num_kv_heads") not in (None, heads):
        raise config.error(
            "num_kv_heads other than num_heads is not supported: the state is one per head", "num_kv_heads"
        )


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
        part = Config(config.document, (*config.prefix, *path))
        if not isinstance(part.data, dict):
            raise config.error("attn must be an object, or a list of objects", *path)
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
            if not 0 <= layer < config.layer_count or layer in by_layer:
                raise part.error(f"layer {layer} is named twice, or there is none", "layers")
            by_layer[layer] = attention
    return by_layer


def _model(config: Config, name: str, mixer: AnyMixer, ratio: int = 4) -> ModelSpec:
    """Return a model of `mixer` and a gated MLP in every layer but those that `attn` names."""
    config.refuse("attnres_block_size", "attention over residuals is not read")
    hidden = config.integer("hidden_size")
    ffn, softmax = _ffn(config, hidden, ratio), _attention(config, hidden)
    linear = Layer(mixer=mixer, ffn=ffn)
    layers = [Layer(mixer=softmax[i], ffn=ffn) if i in softmax else linear for i in range(config.layer_count)]
    return assemble(config, name, layers, Norm(), tie=False)


def gla(config: Config, name: str) -> ModelSpec:
    """Gated linear attention."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_heads", default=4)
    _no_grouping(config, heads)
    mixer = GLA(
        heads=heads,
        **_head_dims(config, hidden, heads, ("expand_k", 0.5), ("expand_v", 1.0)),
        conv_size=_convolution(config, False),
        output_gate=config.boolean("use_output_gate", True),
        output_norm="head" if _affine(config) else "none",
    )
    return _model(config, name, mixer)


def retnet(config: Config, name: str) -> ModelSpec:
    """RetNet; its model does not hand use_short_conv on to the layer."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_heads", default=8)
    _no_grouping(config, heads)
    mixer = RetNet(
        heads=heads,
        **_head_dims(config, hidden, heads, ("expand_k", 1.0), ("expand_v", 2.0)),
        output_gate=config.boolean("use_output_gate", True),
        output_norm="head" if _affine(config) else "none",
    )
    return _model(config, name, mixer, ratio=2)


def delta_net(config: Config, name: str) -> ModelSpec:
    """DeltaNet."""
    if not config.boolean("use_beta", True):
        raise config.error("use_beta false is not supported: the delta rule here has a learning rate", "use_beta")
    hidden, heads = config.integer("hidden_size"), config.integer("num_heads", default=16)
    mixer = DeltaNet(
        heads=heads,
        **_head_dims(config, hidden, heads, ("expand_k", 1.0), ("expand_v", 1.0)),
        conv_size=_convolution(config, True),
        output_gate=config.boolean("use_gate", False),
    )
    return _model(config, name, mixer)


def _value_heads(config: Config, default_heads: int, default_dim: int, expand: float) -> dict[str, Any]:
    """Return the heads of gated DeltaNet and KDA: states per value head, expand_v times head_dim wide."""
    keys = config.integer("num_heads", default=default_heads)
    heads = config.integer("num_v_heads", default=keys)
    if heads % keys:
        raise config.error(f"num_v_heads {heads} is not a multiple of num_heads {keys}", "num_v_heads")
    dim = config.integer("head_dim", default=default_dim)
    return {
        "heads": heads,
        "key_heads": keys,
        "head_dim": dim,
        "v_head_dim": config.multiple("expand_v", default=expand, of=dim),
        "conv_size": _convolution(config, True),
    }


def gated_deltanet(config: Config, name: str) -> ModelSpec:
    """Gated DeltaNet."""
    mixer = GatedDeltaNet(**_value_heads(config, 6, 256, 2.0), output_gate=config.boolean("use_gate", True))
    return _model(config, name, mixer)


def kda(config: Config, name: str) -> ModelSpec:
    """Kimi delta attention; unlike Kimi Linear's, fla's output gate has biases."""
    return _model(config, name, KDA(**_value_heads(config, 16, 128, 1.0), gate_bias=True))


def gsa(config: Config, name: str) -> ModelSpec:
    """Gated slot attention; the misspelt expansions are fla's own."""
    if config.data.get("feature_map", "swish") == "t2r":
        raise config.error("feature_map t2r is not supported: it has parameters", "feature_map")
    hidden, heads = config.integer("hidden_size"), config.integer("num_heads", default=4)
    _no_grouping(config, heads)
    key, value = ("expand_k" if config.has("expand_k") else "exapnd_k"), "expand_v"
    dims = _head_dims(config, hidden, heads, (key, 1.0), (value if config.has(value) else "exapnd_v", 1.0))
    mixer = GSA(
        heads=heads,
        **dims,
        slots=config.optional_integer("num_slots", absent=64) or dims["head_dim"],
        conv_size=_convolution(config, False),
        output_norm="full" if _affine(config) else "none",
    )
    return _model(config, name, mixer)


def rwkv7(config: Config, name: str) -> ModelSpec:
    """RWKV-7: no value residual in the first layer, a norm behind the embedding, a token shift before each FFN.

    fla's own files give value_dim per layer; the ranks have no default here, as the published files state them.
    """
    hidden, count = config.integer("hidden_size"), config.layer_count
    dim = config.optional_integer("head_dim", absent=64)
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
    ffn = MLP(intermediate_size=_channel_mix(config, hidden), gated=False)
    layers = []
    for index, width in enumerate(widths):
        rank = value_rank if index else None
        mixer = RWKV7(heads=heads, head_dim=dim, v_head_dim=width // heads, value_rank=rank, **ranks)
        layers.append(Layer(mixer=mixer, ffn=ffn))
    first = config.boolean("norm_first", True)
    norm = Norm(kind="layernorm", embedding=first, bias=config.boolean("norm_bias", True))
    return assemble(config, name, layers, norm, tie=False)


def _channel_mix(config: Config, hidden: int) -> int:
    width = config.optional_integer("intermediate_size")
    return width or -(-config.multiple("hidden_ratio", default=4, of=hidden) // 32) * 32


def _value_dims(config: Config, hidden: int, count: int) -> list[int]:
    value = config.data.get("value_dim")
    widths = config.integers("value_dim") if isinstance(value, list) else [config.integer("value_dim", default=hidden)]
    widths = widths if isinstance(value, list) else widths * count
    if len(widths) != count or any(width < hidden or width % hidden for width in widths):
        raise config.error(
            f"value_dim must be a multiple of hidden_size {hidden} for each of {count} layers", "value_dim"
        )
    return widths


def _softmax_heads(config: Config, default_heads: int, default_dim: int | None = None) -> dict[str, Any]:
    hidden, heads = config.integer("hidden_size"), config.integer("num_heads", default=default_heads)
    if default_dim is None:
        config.check_divides("num_heads", heads, "hidden_size", hidden)
    kv_heads = config.integer("num_kv_heads", default=heads)
    config.check_divides("num_kv_heads", kv_heads, "num_heads", heads)
    dim = hidden // heads if default_dim is None else config.integer("head_dim", default=default_dim)
    bias = "qkv" if config.boolean("qkv_bias", False) else False
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "bias": bias}


def transformer(config: Config, name: str) -> ModelSpec:
    """fla's plain Transformer."""
    mixer = Attention(
        **_softmax_heads(config, 32),
        qk_norm="head" if config.boolean("qk_norm", False) else "none",
        window=config.optional_integer("window_size"),
    )
    return _model(config, name, mixer)


def forgetting_transformer(config: Config, name: str) -> ModelSpec:
    """The Forgetting Transformer; its query and key norms have a weight for each feature of all heads."""
    mixer = Forgetting(
        **_softmax_heads(config, 32),
        qk_norm="full" if config.boolean("qk_norm", False) else "none",
        window=config.optional_integer("window_size"),
        output_gate=config.boolean("use_output_gate", False),
    )
    return _model(config, name, mixer)


def nsa(config: Config, name: str) -> ModelSpec:
    """Native sparse attention as fla has it: blocks of one size, compressed without overlap, and picked."""
    block = config.integer("block_size", default=64)
    heads = _softmax_heads(config, 64, default_dim=32)
    if "num_kv_heads" not in config.data:
        heads["kv_heads"] = 4
    mixer = NSA(
        **heads,
        compress_size=block,
        compress_stride=block,
        select_size=block,
        select_count=config.integer("block_counts", default=16),
        window=config.integer("window_size", default=512),
    )
    return _model(config, name, mixer)


def moba(config: Config, name: str) -> ModelSpec:
    """Mixture of block attention; fla normalises each head's output."""
    config.refuse("window_size", "MoBA's blocks are not in a window")
    config.refuse("use_output_gate", "MoBA's low-rank gate is not read")
    mixer = MoBA(
        **_softmax_heads(config, 32),
        qk_norm="head" if config.boolean("qk_norm", False) else "none",
        block_size=config.integer("moba_chunk_size", default=256),
        top_k=config.integer("moba_topk", default=4),
        output_norm=True,
    )
    return _model(config, name, mixer)


def log_linear_mamba2(config: Config, name: str) -> ModelSpec:
    """Log-linear attention over Mamba-2, with 15 levels, and a gated MLP in every layer."""
    plain = mamba2_mixer(config, default_groups=1)
    fields = msgspec.structs.asdict(plain)
    return _model(config, name, LogLinear(**fields | {"chunk_size": config.integer("chunk_size", default=64)}))


FAMILIES: dict[str, Callable[[Config, str], ModelSpec]] = {
    "delta_net": delta_net,
    "forgetting_transformer": forgetting_transformer,
    "gated_deltanet": gated_deltanet,
    "gla": gla,
    "gsa": gsa,
    "kda": kda,
    "log_linear_mamba2": log_linear_mamba2,
    "moba": moba,
    "nsa": nsa,
    "retnet": retnet,
    "rwkv7": rwkv7,
    "transformer": transformer,
}
"""Reader by model_type. fla's mamba and mamba2 share their names, and most of their keys, with transformers'."""
