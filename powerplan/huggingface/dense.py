"""Families whose layers are all attention and a dense MLP."""

from __future__ import annotations

from powerplan.ffn import MLP
from powerplan.huggingface.config import MAX_CONFIG_LAYERS, Config
from powerplan.huggingface.parts import FULL, SLIDING, alternating, assemble, attention_layers, one_window, windows_of
from powerplan.mixers import Attention, Power
from powerplan.mixers.power import MAX_DEGREE
from powerplan.spec import Layer, ModelSpec, Norm


def _layers(mixers: list[Attention], mlp: MLP) -> list[Layer]:
    by_mixer = {mixer: Layer(mixer=mixer, ffn=mlp) for mixer in set(mixers)}
    return [by_mixer[mixer] for mixer in mixers]


def _gated(config: Config, default: int | None = None, bias: bool = False) -> MLP:
    return MLP(intermediate_size=config.integer("intermediate_size", default=default), gated=True, bias=bias)


def gpt2(config: Config, name: str) -> ModelSpec:
    """GPT-2: learned positions, biases everywhere, plain MLP of 4m where n_inner is null, tied."""
    config.refuse("add_cross_attention", "powerplan plans decoders without cross-attention")
    hidden = config.integer("n_embd", "hidden_size")
    mixers = attention_layers(config, [None] * config.layer_count, bias=True)
    mlp = MLP(intermediate_size=config.integer("n_inner", default=4 * hidden), gated=False, bias=True)
    positions = config.integer("n_positions", "max_position_embeddings", "n_ctx", default=1024)
    norm = Norm(kind="layernorm")
    return assemble(config, name, _layers(mixers, mlp), norm, tie=True, position_embeddings=positions)


def llama(config: Config, name: str) -> ModelSpec:
    """Llama 1 to 3: GQA, gated MLP; attention_bias covers all four projections, mlp_bias all three."""
    window = config.optional_integer("sliding_window")
    windows = windows_of(config, window, [FULL] * config.layer_count, applied=False)
    mixers = attention_layers(config, windows, bias=config.boolean("attention_bias", False))
    mlp = _gated(config, bias=config.boolean("mlp_bias", False))
    return assemble(config, name, _layers(mixers, mlp), Norm(), tie=False)


def mistral(config: Config, name: str) -> ModelSpec:
    """Mistral: a window in every layer unless sliding_window is null (its default is 4,096), 8 key/value heads."""
    window = config.optional_integer("sliding_window", absent=4096)
    mixers = attention_layers(config, one_window(config, window), default_kv_heads=8)
    return assemble(config, name, _layers(mixers, _gated(config)), Norm(), tie=False)


def qwen_windows(config: Config) -> list[int | None]:
    """Windows of Qwen 2 and 3: only with use_sliding_window, and then from layer max_window_layers on."""
    window = config.optional_integer("sliding_window", absent=4096)
    if not config.boolean("use_sliding_window", False):
        window = None
    first = config.integer("max_window_layers", default=28, low=0)
    count = config.layer_count
    full = count if window is None else min(first, count)
    return windows_of(config, window, [FULL] * full + [SLIDING] * (count - full))


def qwen2(config: Config, name: str) -> ModelSpec:
    """Qwen 2 and 2.5: biases on query, key and value only."""
    mixers = attention_layers(config, qwen_windows(config), bias="qkv", default_kv_heads=32)
    return assemble(config, name, _layers(mixers, _gated(config)), Norm(), tie=False)


def qwen3(config: Config, name: str) -> ModelSpec:
    """Qwen 3: qk-norm per head, head_dim 128 whatever the width."""
    windows, bias = qwen_windows(config), config.boolean("attention_bias", False)
    mixers = attention_layers(config, windows, default_kv_heads=32, default_head_dim=128, bias=bias, qk_norm="head")
    return assemble(config, name, _layers(mixers, _gated(config)), Norm(), tie=False)


def gemma2(config: Config, name: str) -> ModelSpec:
    """Gemma 2: windows in every other layer from the first on, four norms a layer, tied."""
    config.refuse("use_bidirectional_attention", "powerplan counts causal attention")
    window = config.optional_integer("sliding_window", absent=4096)
    windows = windows_of(config, window, alternating(config.layer_count, 2))
    bias = config.boolean("attention_bias", False)
    mixers = attention_layers(config, windows, default_kv_heads=4, default_head_dim=256, bias=bias)
    return assemble(config, name, _layers(mixers, _gated(config)), Norm(per_layer=4), tie=True)


def gemma3(config: Config, name: str) -> ModelSpec:
    """Gemma 3 text decoder: full attention in every sixth layer, qk-norm per head, four norms a layer, tied.

    Published files of the larger models nest it under text_config and leave out what equals transformers' defaults.
    """
    config.refuse("use_bidirectional_attention", "powerplan counts causal attention")
    nested = bool(config.prefix)
    count = config.integer("num_hidden_layers", default=26 if nested else None, high=MAX_CONFIG_LAYERS)
    period = config.integer("sliding_window_pattern", default=6)
    window = config.optional_integer("sliding_window", absent=4096)
    mixers = attention_layers(
        config,
        windows_of(config, window, alternating(count, period)),
        default_hidden=2304 if nested else None,
        default_heads=8 if nested else None,
        default_kv_heads=4,
        default_head_dim=256,
        bias=config.boolean("attention_bias", False),
        qk_norm="head",
    )
    return assemble(
        config,
        name,
        _layers(mixers, _gated(config, default=9216 if nested else None)),
        Norm(per_layer=4),
        tie=True,
        default_vocab=262_208 if nested else None,
        default_hidden=2304 if nested else None,
    )


def olmo2(config: Config, name: str) -> ModelSpec:
    """OLMo 2: norms after attention and MLP, qk-norm over all heads."""
    mixers = attention_layers(
        config, [None] * config.layer_count, bias=config.boolean("attention_bias", False), qk_norm="full"
    )
    return assemble(config, name, _layers(mixers, _gated(config)), Norm(), tie=False)


def powercoder(config: Config, name: str) -> ModelSpec:
    """PowerCoder: StarCoder 2 with power attention of degree 2 and a gate per key/value head in every layer.

    The degree is not in the file: it is that of the published code. chunk_size is that of its kernels.
    """
    config.refuse("sliding_window", "power attention keeps no window")
    bias = config.boolean("use_bias", True)
    (heads,) = attention_layers(config, [None], default_kv_heads=2, bias=bias)
    mixer = Power(
        p=config.integer("deg", "power", default=2, high=MAX_DEGREE),
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        bias=bias,
        gated=True,
        chunk_size=config.optional_integer("chunk_size"),
    )
    mlp = MLP(intermediate_size=config.integer("intermediate_size"), gated=False, bias=bias)
    layers = [Layer(mixer=mixer, ffn=mlp)] * config.layer_count
    return assemble(config, name, layers, Norm(kind="layernorm"), tie=True)


def starcoder2(config: Config, name: str) -> ModelSpec:
    """StarCoder 2: layernorm, plain MLP, use_bias on every projection, a window in every layer or none, tied."""
    window = config.optional_integer("sliding_window")
    bias = config.boolean("use_bias", True)
    mixers = attention_layers(config, one_window(config, window), default_kv_heads=2, bias=bias)
    mlp = MLP(intermediate_size=config.integer("intermediate_size"), gated=False, bias=bias)
    return assemble(config, name, _layers(mixers, mlp), Norm(kind="layernorm"), tie=True)
