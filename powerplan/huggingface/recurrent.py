"""Families of gated recurrences: xLSTM, RecurrentGemma, RWKV-4."""

from __future__ import annotations

from msgspec.structs import replace

from powerplan.extras import Extra
from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import MAX_CONFIG_LAYERS, Config, Family
from powerplan.mixers import MLSTM, RGLRU, RWKV4, AnyMixer
from powerplan.part import MAX_WIDTH
from powerplan.spec import Layer, ModelSpec, Norm


def xlstm(config: Config, name: str) -> ModelSpec:
    """xLSTM 7B: mLSTM and a gated MLP in every layer. Its dims are factors of the width, the MLP's rounded up to 64."""
    config.word("weight_mode", ("single", "fused"))
    hidden, heads = config.integer("hidden_size", "embedding_dim"), config.integer("num_heads")
    config.derived("embedding_dim", hidden, "hidden_size")
    if not config.boolean("add_out_norm", True):
        raise config.error(
            "add_out_norm false is not supported: transformers' xlstm always has that norm", "add_out_norm"
        )
    bias = config.boolean("use_bias", False)
    dims = [
        int(hidden * _factor(config, key, default)) for key, default in (("qk_dim_factor", 0.5), ("v_dim_factor", 1.0))
    ]
    for key, dim in zip(("qk_dim_factor", "v_dim_factor"), dims, strict=True):
        if dim % heads or not dim:
            raise config.error(f"{key} gives {dim:,} features, no multiple of num_heads {heads}", key)
    mixer = MLSTM(
        heads=heads,
        head_dim=dims[0] // heads,
        v_head_dim=dims[1] // heads,
        bias=bias,
        chunk_size=config.integer("chunk_size", default=64),
    )
    multiple = config.integer("ffn_round_up_to_multiple_of", default=64)
    width = -(-int(hidden * _factor(config, "ffn_proj_factor", 2.667)) // multiple) * multiple
    extras = (Extra(name="biases of the norms", vectors=2),) if bias else ()
    layer = Layer(mixer=mixer, ffn=MLP(intermediate_size=width, bias=bias), extras=extras)
    count = config.integer("num_hidden_layers", "num_blocks", high=MAX_CONFIG_LAYERS)
    config.derived("num_blocks", count, "num_hidden_layers")
    spec = parts.assemble(config, name, [layer] * count, ties=False)
    return replace(spec, hidden_size=hidden)


def _factor(config: Config, key: str, default: float) -> float:
    value = config.value(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1000:
        raise config.error(f"{key} must be a number above 0", key)
    return float(value)


def recurrent_gemma(config: Config, name: str) -> ModelSpec:
    """RecurrentGemma: RG-LRU, and attention in a window, as block_types repeats; MLPs of half intermediate_size."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    width = config.optional_integer("lru_width") or hidden
    if width % heads:
        raise config.error(f"lru_width {width} is not a multiple of num_attention_heads {heads}", "lru_width")
    window = config.integer("attention_window_size")
    softmax = parts.attention(config, bias=True if config.boolean("attention_bias", False) else "output")
    kinds: dict[str, AnyMixer] = {
        "recurrent": RGLRU(
            heads=heads, head_dim=width // heads, conv_size=config.integer("conv1d_width", high=MAX_WIDTH)
        ),
        "attention": replace(softmax, window=window),
    }
    types = config.strings("block_types") or config.strings("_block_types") or ["recurrent", "recurrent", "attention"]
    if not types or set(types) - set(kinds):
        raise config.error("block_types must name recurrent and attention blocks", "block_types")
    mlp = MLP(intermediate_size=config.integer("intermediate_size") // 2, bias=True)
    layers = [Layer(mixer=kinds[types[index % len(types)]], ffn=mlp) for index in range(config.layer_count)]
    return parts.assemble(config, name, layers)


def rwkv(config: Config, name: str) -> ModelSpec:
    """RWKV-4: time mix and channel mix, whose FFN has a receptance of m x m; layernorms, one behind the embedding."""
    hidden = config.integer("hidden_size")
    inner = config.optional_integer("attention_hidden_size") or hidden
    if inner != hidden:
        problem = f"attention_hidden_size {inner} other than hidden_size {hidden} is not supported"
        raise config.error(problem, "attention_hidden_size")
    width = config.optional_integer("intermediate_size") or 4 * hidden
    receptance = Extra(name="receptance of the channel mix", vectors=hidden, matmul=True)
    mlp = MLP(intermediate_size=width, gated=False)
    layer = Layer(mixer=RWKV4(inner_size=hidden), ffn=mlp, extras=(receptance,))
    norm = Norm(kind="layernorm", embedding=True)
    return parts.assemble(config, name, [layer] * config.layer_count, norm=norm)


FAMILIES: dict[str, Family] = {
    "recurrent_gemma": Family(
        recurrent_gemma, inert=frozenset({"final_w_init_variance_scale", "query_pre_attn_scalar"})
    ),
    "rwkv": Family(rwkv),
    "xlstm": Family(xlstm),
}
"""Reader by model_type."""
