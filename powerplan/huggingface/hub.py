"""More dense families whose code is on the hub and not in transformers: layers unlike each other, and older designs.

Counted by their public code; OpenELM, Baichuan-M1, PLaMo and TeleChat 3 against mlx-lm's models as well.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from powerplan.errors import shown
from powerplan.extras import Extra
from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import MAX_CONFIG_LAYERS, Config, Family, keys
from powerplan.huggingface.dense import LAYERNORM, dense, layered, llama
from powerplan.mixers import Attention
from powerplan.spec import Layer, ModelSpec, Norm, group_layers


def xverse(config: Config, name: str) -> ModelSpec:
    """XVERSE: Llama. XVERSE-13B of 100,278 tokens has 13,715,031,040 parameters."""
    return llama(config, name, refused=[("num_experts", "experts of XVERSE-MoE are not read")])


def orion(config: Config, name: str) -> ModelSpec:
    """Orion: Llama with LayerNorms. Orion-14B has 14,498,703,360 parameters."""
    config.refuse("attention_bias", "no published Orion has biases")
    return dense(config, name, bias=False, norm=LAYERNORM)


def pangu_embedded(config: Config, name: str) -> ModelSpec:
    """openPangu-Embedded: Llama with `bias` on all of attention."""
    config.refuse("sandwich_norm", "no published openPangu-Embedded has it")
    config.refuse("qkv_bias", "no published openPangu-Embedded states it beside bias")
    return dense(config, name, bias="bias", mlp_bias="mlp_bias")


def telechat(config: Config, name: str) -> ModelSpec:
    """TeleChat 1 and 2: Llama with biases on the output projection of attention and on the down projection."""
    config.refuse("embed_layernorm", "no published TeleChat has a norm of the embedding")
    config.refuse("apply_residual_connection_post_layernorm", "no published TeleChat has it")
    mixers = parts.attention_layers(config, [None] * config.layer_count, bias="output")
    down = Extra(name="down projection bias", vectors=1)
    return layered(config, name, mixers).map_layers(lambda layer: replace(layer, extras=(down,)))


def jais(config: Config, name: str) -> ModelSpec:
    """Jais: GPT-2 with ALiBi in place of learned positions, and a gated MLP (swiglu) with biases.

    Jais-13B: 40 layers, 5120 wide.
    """
    width = config.optional_integer("n_inner") or 4 * config.integer("hidden_size", "n_embd")
    gated = config.value("activation_function") == "swiglu"
    layer = Layer(mixer=parts.attention(config, bias=True), ffn=MLP(intermediate_size=width, gated=gated, bias=True))
    fields: dict[str, Any] = {}
    if config.word("position_embedding_type", ("learned", "alibi")) == "learned":
        fields["position_embeddings"] = config.integer("n_positions", "max_position_embeddings", default=2048)
    return parts.assemble(config, name, [layer] * config.layer_count, norm=LAYERNORM, tie=True, **fields)


def plamo(config: Config, name: str) -> ModelSpec:
    """PLaMo 1: attention and MLP side by side behind one norm; n_shared_head query heads share keys and values."""
    heads = config.integer("num_attention_heads")
    shared = config.integer("n_shared_head", default=8)
    attention = replace(parts.attention(config), kv_heads=-(-heads // shared))
    return layered(config, name, [attention] * config.layer_count, norm=Norm(per_layer=1))


def openelm(config: Config, name: str) -> ModelSpec:
    """OpenELM: heads and MLP widths of each layer's own. OpenELM-1.1B has 1,079,891,456 parameters."""
    for key in ("ffn_with_glu", "share_input_output_layers"):
        if not config.boolean(key, True):
            raise config.error(f"{key} false is not supported: no published OpenELM has it", key)
    config.word("normalization_layer_name", ("rms_norm",))
    count = config.integer("num_transformer_layers", high=MAX_CONFIG_LAYERS)
    model, dim = config.integer("model_dim"), config.integer("head_dim")
    norm: Any = "head" if config.boolean("normalize_qk_projections", True) else "none"
    heads, groups = (_of_each(config, key, count) for key in ("num_query_heads", "num_kv_heads"))
    widths = _openelm_widths(config, model, count)
    layers = []
    for index in range(count):
        if heads[index] % groups[index]:
            problem = f"num_kv_heads[{index}] is {groups[index]}, which does not divide {heads[index]} heads"
            raise config.error(problem, "num_kv_heads", index)
        attention = Attention(heads=heads[index], kv_heads=groups[index], head_dim=dim, qk_norm=norm)
        layers.append(Layer(mixer=attention, ffn=MLP(intermediate_size=widths[index])))
    return ModelSpec(
        name=name,
        vocab_size=config.integer("vocab_size"),
        hidden_size=model,
        tie_embeddings=True,
        layers=group_layers(layers),
    )


def _of_each(config: Config, key: str, count: int) -> list[int]:
    """Return a list with a positive integer for each layer."""
    entries = config.integers(key)
    if len(entries) != count:
        raise config.error(f"{key} has {len(entries)} entries for {count} layers", key)
    for index, entry in enumerate(entries):
        if entry < 1:
            raise config.error(f"{key}[{index}] must be above 0, and is {entry}", key, index)
    return entries


def _openelm_widths(config: Config, model: int, count: int) -> list[int]:
    """Return ffn_multipliers times the hidden size, to the nearest multiple of ffn_dim_divisor.

    A multiple that is below nine tenths is the next one. OpenELM, modeling_openelm.py, make_divisible.
    """
    divisor, entries = config.integer("ffn_dim_divisor"), config.data.get("ffn_multipliers")
    if not isinstance(entries, list) or len(entries) != count:
        problem = f"ffn_multipliers must be a list with a number for each of {count} layers"
        raise config.error(problem, "ffn_multipliers")
    widths = []
    for index, entry in enumerate(entries):
        if isinstance(entry, bool) or not isinstance(entry, (int, float)) or not 0 < entry <= 1000:
            problem = f"ffn_multipliers[{index}] must be a number from 0 to 1,000, and is {shown(entry)}"
            raise config.error(problem, "ffn_multipliers", index)
        wanted = entry * model
        width = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
        widths.append(width + divisor if width < 0.9 * wanted else width)
    return widths


def baichuan_m1(config: Config, name: str) -> ModelSpec:
    """Baichuan-M1: keys and values of two tokens are mixed, with two weights for each head, before attention.

    Layers of sliding_window_layers have a window and heads of their own, num_swa_attention_heads.
    """
    if config.integer("conv_window", default=2) != 2:
        raise config.error("conv_window is not 2, as in every published Baichuan-M1", "conv_window")
    hidden, window = config.integer("hidden_size"), config.integer("sliding_window")
    sliding = set(config.integers("sliding_window_layers"))
    plain = parts.attention(config)
    heads = config.optional_integer("num_swa_attention_heads") or plain.heads
    groups = config.optional_integer("num_swa_key_value_heads") or plain.kv_heads
    config.check_divides("num_swa_attention_heads", heads, "hidden_size", hidden)
    config.check_divides("num_swa_key_value_heads", groups, "num_swa_attention_heads", heads)
    local = Attention(heads=heads, kv_heads=groups, head_dim=hidden // heads, window=window)
    config.note("baichuan_m1: the last key and value of each head, which its convolutions keep, are not counted")
    mlp = MLP(intermediate_size=config.integer("intermediate_size"))
    layers = [
        Layer(mixer=mixer, ffn=mlp, extras=(Extra(name="key and value convolutions", elements=4 * mixer.kv_heads),))
        for mixer in (local if index in sliding else plain for index in range(config.layer_count))
    ]
    return parts.assemble(config, name, layers)


BLOOMLIKE = keys(
    """
    attention_softmax_in_fp32 bias_dropout_fusion embed_layernorm flash_attn logn masked_softmax_fusion offset_alibi
    seq_length skip_bias_add skip_bias_add_qkv training_seqlen
    """
)
GPT_NAMES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"}
JAIS = keys(
    """
    alibi_scaling embeddings_scale mup_embeddings_scale mup_output_alpha mup_scale_qk_dot_by_d mup_width_scale
    scale_qk_dot_by_d width_scale
    """
)
OPENELM = keys(
    """
    activation_fn_name normalization_layer_name num_gqa_groups qkv_multipliers rope_freq_constant rope_max_length
    """
)
SOLAR = keys("bskcn_1 bskcn_2 bskcn_3 bskcn_4 bskcn_tv sliding_window")

FAMILIES: dict[str, Family] = {
    "PanguEmbedded": Family(pangu_embedded, inert=keys("qkv_bias")),
    "Yi": Family(llama),
    "aquila": Family(llama),
    "baichuan_m1": Family(baichuan_m1),
    "jais": Family(jais, aliases=GPT_NAMES, inert=JAIS),
    "openelm": Family(openelm, inert=OPENELM),
    "orion": Family(orion),
    "plamo": Family(plamo, inert=keys("n_shared_head")),
    "solar": Family(llama, inert=SOLAR),
    "telechat": Family(
        telechat,
        aliases={
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "ffn_hidden_size",
        },
        inert=BLOOMLIKE,
    ),
    "telechat3": Family(llama),
    "xverse": Family(xverse, inert=keys("max_tokenizer_truncation")),
}
"""Reader by model_type."""
