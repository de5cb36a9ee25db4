"""Gemma 3n and Gemma 4: embeddings per layer, shared keys and values, two head dims, AltUp, experts beside an MLP."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from powerplan.extras import Extra
from powerplan.ffn import MLP, AnyFFN, MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.parts import FULL, SLIDING
from powerplan.mixers import Attention
from powerplan.spec import Layer, ModelSpec, Norm


def _types(config: Config, period: int) -> list[str]:
    default = [SLIDING if (index + 1) % period else FULL for index in range(config.layer_count)]
    return list(parts.layer_types(config, default, (FULL, SLIDING)))


def _attention(config: Config, types: Sequence[str], full: Attention, sliding: Attention) -> list[Attention]:
    """Return the attention of each layer; the last num_kv_shared_layers take keys and values of an earlier one."""
    window = config.integer("sliding_window")
    first_shared = config.layer_count - config.integer("num_kv_shared_layers", default=0, low=0)
    if first_shared < config.layer_count and not set(types) <= set(types[: max(0, first_shared)]):
        problem = "num_kv_shared_layers leaves a kind of layer without one that makes keys and values"
        raise config.error(problem, "num_kv_shared_layers")
    kinds = {FULL: full, SLIDING: replace(sliding, window=window)}
    shared = {kind: replace(kinds[kind], shared_kv=True, keys_as_values=False) for kind in kinds}
    return [(shared if index >= first_shared else kinds)[kind] for index, kind in enumerate(types)]


def _layer_inputs(config: Config) -> tuple[tuple[Extra, ...], tuple[Extra, ...]]:
    """Return what the embeddings per layer add to a layer, and to the model: a look-up, a projection, a gate, norms."""
    key = "hidden_size_per_layer_input"
    width = config.optional_integer(key, low=0) if key in config.defaults else None
    if not width:
        return (), ()
    total, vocabulary = config.layer_count * width, config.integer("vocab_size_per_layer_input")
    layer = (
        Extra(name="gate and projection of the layer's embedding", vectors=2 * width, matmul=True),
        Extra(name="norm of the layer's embedding", vectors=1),
    )
    model = (
        Extra(name="embedding of each layer", elements=vocabulary * total, lookup=True),
        Extra(name="projection to each layer's embedding", vectors=total, matmul=True),
        Extra(name="norm of that projection", elements=width),
    )
    return layer, model


def gemma3n(config: Config, name: str) -> ModelSpec:
    """Gemma 3n: embeddings per layer, AltUp over altup_num_inputs streams, LAuReL, shared keys and values; tied.

    The products of AltUp between streams and their coefficients, 4mn² FLOPs a token and layer, are not counted.
    """
    types, bias = _types(config, 5), config.boolean("attention_bias", False)
    attention = parts.attention(config, bias=bias, qk_norm="head")
    streams, rank = config.integer("altup_num_inputs"), config.integer("laurel_rank")
    inputs, model = _layer_inputs(config)
    extras = (
        Extra(name="AltUp", vectors=streams, elements=streams**2 + streams**3, matmul=True),
        Extra(name="LAuReL", vectors=2 * rank, matmul=True),
        Extra(name="scales and norms of AltUp and LAuReL", vectors=3),
        *inputs,
    )
    if streams > 1:
        model += (Extra(name="AltUp", vectors=2 * (streams - 1) * config.integer("hidden_size"), matmul=True),)
    layers = [
        Layer(mixer=mixer, ffn=MLP(intermediate_size=width), extras=extras)
        for mixer, width in zip(_attention(config, types, attention, attention), _widths(config), strict=True)
    ]
    return parts.assemble(config, name, layers, norm=Norm(per_layer=4), extras=model)


def _widths(config: Config) -> list[int]:
    """Return the width of each layer's MLP; intermediate_size is one number, or a list of them."""
    if not isinstance(config.value("intermediate_size"), list):
        return [config.integer("intermediate_size")] * config.layer_count
    widths = config.integers("intermediate_size")
    if len(widths) != config.layer_count or min(widths, default=0) < 1:
        problem = f"intermediate_size must have a width for each of {config.layer_count} layers"
        raise config.error(problem, "intermediate_size")
    return widths


def gemma4(config: Config, name: str) -> ModelSpec:
    """Gemma 4: full attention in every sixth layer, with head dim and key/value heads of its own; tied.

    Gemma 4 Unified has neither embeddings per layer nor experts, and its files with their keys are refused.
    attention_k_eq_v: in full layers the keys' projection makes the values. enable_moe_block: experts beside the MLP,
    which counts as a shared expert here. The scalar of each layer is a buffer, and not counted.
    """
    if config.value("use_bidirectional_attention") not in (None, False, "vision"):  # "vision": between image tokens.
        config.refuse("use_bidirectional_attention", "powerplan counts causal attention")
    types, bias = _types(config, 6), config.boolean("attention_bias", False)
    if types[-1] != FULL:
        config.note("the last layer is full attention, whatever layer_types says, as in transformers")
        types[-1] = FULL
    sliding = parts.attention(config, bias=bias, qk_norm="head")
    full = _full(config, types, sliding)
    mixers = _attention(config, types, full, sliding)
    width = config.integer("intermediate_size")
    double = config.boolean("use_double_wide_mlp", False)
    inputs, model = _layer_inputs(config)
    moe, norms, experts = _experts(config, width)
    layers = []
    for mixer in mixers:
        mlp: AnyFFN = MLP(intermediate_size=2 * width if double and mixer.shared_kv else width)
        layers.append(Layer(mixer=mixer, ffn=moe or mlp, extras=(*inputs, *experts)))
    if moe is not None and double:
        raise config.error("use_double_wide_mlp is not read beside experts", "use_double_wide_mlp")
    return parts.assemble(config, name, layers, norm=Norm(per_layer=4 + norms), extras=model)


def _full(config: Config, types: Sequence[str], sliding: Attention) -> Attention:
    """Return the attention of the full layers: global_head_dim and num_global_key_value_heads, or per_layer_config."""
    k_eq_v = config.boolean("attention_k_eq_v", False)
    dim = config.integer("global_head_dim", default=512)
    kv_heads = config.optional_integer("num_global_key_value_heads")
    if not (k_eq_v or "attention_k_eq_v" not in config.defaults):
        kv_heads = None
    if "per_layer_config" in config.data and not config.has("per_layer_config"):
        return replace(sliding, keys_as_values=k_eq_v)  # null means that no layer has sizes of its own
    stated = config.value("per_layer_config")
    if isinstance(stated, dict):
        overrides = [stated[index] for index in stated]
        layers = sorted(int(index) for index in stated if index.isdigit())
        alike = all(override == overrides[0] and set(override) <= OVERRIDDEN for override in overrides)
        if layers != [index for index, kind in enumerate(types) if kind == FULL] or not alike:
            problem = "per_layer_config must hold the same head_dim for each of the full layers, and for no other"
            raise config.error(problem, "per_layer_config")
        part = config.part("per_layer_config", next(iter(stated)))
        dim = part.integer("head_dim", default=sliding.head_dim)
        kv_heads = part.optional_integer("num_key_value_heads") if "num_key_value_heads" in part.data else kv_heads
    kv_heads = kv_heads or sliding.kv_heads
    config.check_divides("num_global_key_value_heads", kv_heads, "num_attention_heads", sliding.heads)
    return replace(sliding, head_dim=dim, v_head_dim=dim, kv_heads=kv_heads, keys_as_values=k_eq_v)


OVERRIDDEN = {"head_dim", "num_key_value_heads"}
"""What per_layer_config may say of a layer."""


def _experts(config: Config, width: int) -> tuple[MoE | None, int, tuple[Extra, ...]]:
    """Return the experts with the MLP as their shared one, how many norms they add, and their scales."""
    key = "enable_moe_block"
    if key not in config.defaults or not config.boolean(key, False):
        return None, 0, ()
    experts = config.integer("num_experts")
    chosen = config.integer("top_k_experts", high=experts)
    moe = MoE(
        experts=experts,
        top_k=chosen,
        intermediate_size=config.integer("moe_intermediate_size"),
        shared_intermediate_size=width,
    )
    return moe, 3, (Extra(name="scales of the router", vectors=1, elements=experts),)


WITH_EXPERTS = frozenset({"moe_intermediate_size", "num_experts", "top_k_experts"})
"""Keys that count with enable_moe_block alone."""

FAMILIES: dict[str, Family] = {
    "gemma3n_text": Family(gemma3n, inert=frozenset({"altup_correct_scale"})),
    "gemma4_text": Family(gemma4, inert=WITH_EXPERTS),
    "gemma4_unified_text": Family(gemma4),
}
"""Reader by model_type."""
