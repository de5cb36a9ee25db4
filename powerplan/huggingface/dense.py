"""Families whose layers are all attention and a dense MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family
from powerplan.mixers import AnyMixer, Power
from powerplan.mixers.power import MAX_DEGREE
from powerplan.spec import Layer, ModelSpec, Norm

LAYERNORM = Norm(kind="layernorm")


def _model(
    config: Config, name: str, mixers: Sequence[AnyMixer], *, gated: bool = True, bias: bool = False, **fields: Any
) -> ModelSpec:
    """Return a model of `mixers`, each followed by the same MLP."""
    mlp = MLP(intermediate_size=config.integer("intermediate_size"), gated=gated, bias=bias)
    by_mixer = {mixer: Layer(mixer=mixer, ffn=mlp) for mixer in set(mixers)}
    return parts.assemble(config, name, [by_mixer[mixer] for mixer in mixers], **fields)


def gpt2(config: Config, name: str) -> ModelSpec:
    """GPT-2: learned positions, biases everywhere, plain MLP of 4m where n_inner is null, tied."""
    hidden, count = config.integer("n_embd", "hidden_size"), config.layer_count
    attention = parts.attention(config, bias=True)
    mlp = MLP(intermediate_size=config.integer("n_inner", default=4 * hidden), gated=False, bias=True)
    layers = [Layer(mixer=attention, ffn=mlp)] * count
    positions = config.integer("n_positions", "max_position_embeddings", "n_ctx", default=1024)
    return parts.assemble(config, name, layers, norm=LAYERNORM, tie=True, position_embeddings=positions)


def llama(config: Config, name: str) -> ModelSpec:
    """Llama 1 to 3: GQA, gated MLP; attention_bias covers all four projections, mlp_bias all three."""
    window = config.optional_integer("sliding_window")
    windows = parts.windows_of(config, window, [parts.FULL] * config.layer_count, applied=False)
    mixers = parts.attention_layers(config, windows, bias=config.boolean("attention_bias", False))
    return _model(config, name, mixers, bias=config.boolean("mlp_bias", False))


def mistral(config: Config, name: str) -> ModelSpec:
    """Mistral: a window in every layer unless sliding_window is null (its default is 4,096), 8 key/value heads."""
    return _model(config, name, parts.attention_layers(config, parts.one_window(config)))


def qwen_windows(config: Config) -> list[int | None]:
    """Windows of Qwen 2 and 3: only with use_sliding_window, and then from layer max_window_layers on."""
    window = config.optional_integer("sliding_window")
    if not config.boolean("use_sliding_window", False):
        window = None
    first = config.integer("max_window_layers", low=0)
    count = config.layer_count
    full = count if window is None else min(first, count)
    return parts.windows_of(config, window, [parts.FULL] * full + [parts.SLIDING] * (count - full))


def qwen2(config: Config, name: str) -> ModelSpec:
    """Qwen 2 and 2.5: biases on query, key and value only."""
    return _model(config, name, parts.attention_layers(config, qwen_windows(config), bias="qkv"))


def qwen3(config: Config, name: str) -> ModelSpec:
    """Qwen 3: qk-norm per head, head_dim 128 whatever the width."""
    windows, bias = qwen_windows(config), config.boolean("attention_bias", False)
    return _model(config, name, parts.attention_layers(config, windows, bias=bias, qk_norm="head"))


def gemma2(config: Config, name: str) -> ModelSpec:
    """Gemma 2: windows in every other layer from the first on, four norms a layer, tied."""
    config.refuse("use_bidirectional_attention", "powerplan counts causal attention")
    return _gemma(config, name, period=2)


def gemma3(config: Config, name: str) -> ModelSpec:
    """Gemma 3 text decoder: full attention in every sixth layer, qk-norm per head, four norms a layer, tied."""
    config.refuse("use_bidirectional_attention", "powerplan counts causal attention")
    return _gemma(
        config,
        name,
        period=config.integer("sliding_window_pattern", "_sliding_window_pattern", default=6),
        qk_norm="head",
    )


def _gemma(config: Config, name: str, period: int, **fields: Any) -> ModelSpec:
    windows, bias = parts.alternating_windows(config, period), config.boolean("attention_bias", False)
    mixers = parts.attention_layers(config, windows, bias=bias, **fields)
    return _model(config, name, mixers, norm=Norm(per_layer=4), tie=True)


def olmo2(config: Config, name: str) -> ModelSpec:
    """OLMo 2: norms after attention and MLP, qk-norm over all heads."""
    windows, bias = [None] * config.layer_count, config.boolean("attention_bias", False)
    return _model(config, name, parts.attention_layers(config, windows, bias=bias, qk_norm="full"))


def powercoder(config: Config, name: str) -> ModelSpec:
    """PowerCoder: StarCoder 2 with power attention of degree 2 and a gate per key/value head in every layer.

    The degree is not in the file: it is that of the published code. chunk_size is that of its kernels.
    """
    config.refuse("sliding_window", "power attention keeps no window")
    bias = config.boolean("use_bias", True)
    attention = parts.attention(config)
    power = Power(
        p=config.integer("deg", "power", default=2, high=MAX_DEGREE),
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        bias=bias,
        gated=True,
        chunk_size=config.optional_integer("chunk_size"),
    )
    return _model(config, name, [power] * config.layer_count, gated=False, bias=bias, norm=LAYERNORM, tie=True)


def starcoder2(config: Config, name: str) -> ModelSpec:
    """StarCoder 2: layernorm, plain MLP, use_bias on every projection, a window in every layer or none, tied."""
    windows, bias = parts.one_window(config), config.boolean("use_bias", True)
    mixers = parts.attention_layers(config, windows, bias=bias)
    return _model(config, name, mixers, gated=False, bias=bias, norm=LAYERNORM, tie=True)


FAMILIES: dict[str, Family] = {
    "gemma2": Family(gemma2),
    "gemma3_text": Family(gemma3),
    "gpt2": Family(gpt2),
    "llama": Family(llama),
    "mistral": Family(mistral),
    "olmo2": Family(olmo2),
    "powercoder": Family(powercoder, like="starcoder2"),
    "qwen2": Family(qwen2),
    "qwen3": Family(qwen3),
    "starcoder2": Family(starcoder2),
}
"""Reader by model_type."""
