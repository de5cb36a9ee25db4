"""Dense families whose code is on the hub and not in transformers.

Counts were checked against published ones, but for Brumby's: whether its gates have biases is not known (8 a layer).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from powerplan.errors import shown
from powerplan.extras import Extra
from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family, keys
from powerplan.huggingface.dense import dense, layered, llama, power, qwen_windows
from powerplan.mixers import Attention
from powerplan.spec import Layer, ModelSpec


def brumby(config: Config, name: str) -> ModelSpec:
    """Brumby: Qwen 3 with power attention of degree 2 in every layer, and a gate per key/value head."""
    if set(qwen_windows(config)) != {None}:
        raise config.error("use_sliding_window is not supported: power attention keeps no window", "use_sliding_window")
    config.note("brumby: degree 2 and a gate per key/value head, which are in its code and not in the file")
    bias = config.boolean("attention_bias", False)
    return layered(config, name, [power(config, bias=bias, qk_norm="head")] * config.layer_count)


def qwen(config: Config, name: str) -> ModelSpec:
    """Qwen 1: biases on query, key and value, and none elsewhere; the two halves of intermediate_size are gate and up.

    Qwen-7B has 7,721,324,544 parameters.
    """
    if not config.boolean("no_bias", True):
        raise config.error("no_bias false is not supported: no published Qwen has it", "no_bias")
    width = config.integer("intermediate_size")
    if width % 2:
        raise config.error(f"intermediate_size {width} is odd, and its halves are gate and up", "intermediate_size")
    heads = config.integer("num_attention_heads")
    dim = config.optional_integer("kv_channels") or parts.attention(config).head_dim
    attention = Attention(heads=heads, head_dim=dim, bias="qkv")
    layer = Layer(mixer=attention, ffn=MLP(intermediate_size=width // 2))
    return parts.assemble(config, name, [layer] * config.layer_count)


def internlm(config: Config, name: str) -> ModelSpec:
    """InternLM 1 and 2: Llama with `bias` on all of attention. InternLM2-7B has 7,737,708,544 parameters."""
    return dense(config, name, bias="bias")


def minicpm(config: Config, name: str) -> ModelSpec:
    """MiniCPM 1, 2 and 4: Llama, tied unless stated. MiniCPM-2B has 2,724,880,896 parameters."""
    refused = [
        ("num_experts", "experts of MiniCPM-MoE are not read"),
        ("sparse_config", "sparse attention is not read"),
    ]
    return llama(config, name, refused=refused)


def chatglm(config: Config, name: str) -> ModelSpec:
    """ChatGLM 2, 3 and GLM-4 with their own code: add_qkv_bias, and add_bias_linear on all projections.

    ChatGLM3-6B has 6,243,584,000 parameters, GLM-4-9B 9,399,951,360.
    """
    config.refuse("inner_hidden_size", "ChatGLM 1 is a prefix model of another structure")
    config.refuse("position_encoding_2d", "ChatGLM 1 is a prefix model of another structure")
    for key in ("rmsnorm", "post_layer_norm"):
        if not config.boolean(key, True):
            raise config.error(f"{key} false is not supported: no published ChatGLM has it", key)
    config.refuse("apply_residual_connection_post_layernorm", "no published ChatGLM has it")
    if config.data.get("vision_config"):
        config.note("chatglm: the text decoder alone is counted, other towers are not")
    heads, everywhere = config.integer("num_attention_heads"), config.boolean("add_bias_linear", False)
    multiquery = config.boolean("multi_query_attention", False)
    bias: Any = True if everywhere else "qkv" if config.boolean("add_qkv_bias", False) else False
    attention = Attention(
        heads=heads,
        kv_heads=config.integer("multi_query_group_num", default=1) if multiquery else heads,
        head_dim=config.integer("kv_channels", default=128),
        bias=bias,
    )
    config.check_divides("multi_query_group_num", attention.kv_heads, "num_attention_heads", heads)
    layer = Layer(mixer=attention, ffn=MLP(intermediate_size=config.integer("intermediate_size"), bias=everywhere))
    return parts.assemble(config, name, [layer] * config.layer_count)


def deci(config: Config, name: str) -> ModelSpec:
    """DeciLM: Llama with key/value heads of each layer's own. DeciLM-7B has 67 in all, and 7,043,551,232 parameters."""
    groups, count = config.integers("num_key_value_heads_per_layer"), config.layer_count
    if len(groups) != count:
        problem = f"num_key_value_heads_per_layer has {len(groups)} entries for {count} layers"
        raise config.error(problem, "num_key_value_heads_per_layer")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    dim = config.optional_integer("head_dim") or hidden // heads
    for index, number in enumerate(groups):
        if not 0 < number <= heads or heads % number:
            problem = f"num_key_value_heads_per_layer[{index}] is {number}, which does not divide {heads} heads"
            raise config.error(problem, "num_key_value_heads_per_layer", index)
    bias = config.boolean("attention_bias", False)
    mixers = [Attention(heads=heads, kv_heads=number, head_dim=dim, bias=bias) for number in groups]
    return layered(config, name, mixers)


def nemotron_nas(config: Config, name: str) -> ModelSpec:
    """Llama-Nemotron 49B, 51B and 253B: block_configs say for each layer what of attention and MLP it has.

    attention has heads in groups of n_heads_in_group to a key/value head. The MLP's width is two thirds of ffn_mult
    times the hidden size, rounded down, and up to a multiple of 256. Either may be a plain projection
    (replace_with_linear), or missing with its norm (no_op); a layer without both is none.
    Llama-3.3-Nemotron-Super-49B has 49,867,145,216 parameters.
    """
    count, blocks = config.layer_count, config.data.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != count:
        raise config.error(f"block_configs must be a list of {count} blocks, one for each layer", "block_configs")
    layers = []
    for index in range(count):
        for part in ("attention", "ffn"):
            if not isinstance(blocks[index], dict) or not isinstance(blocks[index].get(part), dict):
                raise config.error(f"block_configs[{index}] has no object {part}", "block_configs", index)
        layer = _block(config, index)
        if layer is not None:
            layers.append(layer)
    if not layers:
        raise config.error("block_configs have neither attention nor an MLP in any layer", "block_configs")
    return parts.assemble(config, name, layers)


def _block(config: Config, index: int) -> Layer | None:
    attention, ffn = (config.part("block_configs", index, part) for part in ("attention", "ffn"))
    for key in ("window_length", "num_sink_tokens", "unshifted_sink", "use_prefill_window_in_sink_attention"):
        attention.refuse(key, "no published Llama-Nemotron has windows with sinks")
    for part in (attention, ffn):
        part.refuse("sparsify", "no published Llama-Nemotron has sparse blocks")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    projections = [part for part in (attention, ffn) if part.boolean("replace_with_linear", False)]
    present = [part for part in (attention, ffn) if not part.boolean("no_op", False)]
    linear = [part for part in present if part in projections]
    if not present:
        return None
    if len(linear) == len(present):
        problem = f"block_configs[{index}] has plain projections alone, which is not supported"
        raise config.error(problem, "block_configs", index)
    mixer = mlp = None
    if attention in present and attention not in linear:
        group = attention.integer("n_heads_in_group")
        attention.check_divides("n_heads_in_group", group, "num_attention_heads", heads)
        bias = config.boolean("attention_bias", False)
        mixer = Attention(heads=heads, kv_heads=heads // group, head_dim=hidden // heads, bias=bias)
    if ffn in present and ffn not in linear:
        multiple = ffn.value("ffn_mult")
        if isinstance(multiple, bool) or not isinstance(multiple, (int, float)) or not 0 < multiple <= 1000:
            raise ffn.error(f"ffn_mult must be a number from 0 to 1,000, and is {shown(multiple)}", "ffn_mult")
        width = -(-int(2 * multiple * hidden / 3) // 256) * 256
        mlp = MLP(intermediate_size=width, bias=config.boolean("mlp_bias", False))
    extras = tuple(Extra(name="linear", elements=hidden**2, matmul=True) for _ in linear)
    return Layer(mixer=mixer, ffn=mlp, extras=extras, norms=None if len(present) == 2 else 1)


QWEN = keys(
    """
    bf16 fp16 fp32 onnx_safe softmax_in_fp32 use_cache_kernel use_cache_quantization use_dynamic_ntk use_logn_attn
    """
)
CHATGLM = keys(
    """
    apply_query_key_layer_scaling bias_dropout_fusion boi_token_id eoi_token_id fp32_residual_connection
    layernorm_epsilon original_rope pre_seq_len prefix_projection quantization_bit vision_config
    """
)
CHATGLM_NAMES = {
    "num_hidden_layers": "num_layers",
    "vocab_size": "padded_vocab_size",
    "intermediate_size": "ffn_hidden_size",
}

FAMILIES: dict[str, Family] = {
    "baichuan": Family(partial(dense, bias=False)),
    "brumby": Family(brumby, like="qwen3", inert=frozenset({"switch_over_seq_len"})),
    "chatglm": Family(chatglm, aliases=CHATGLM_NAMES, inert=CHATGLM),
    "deci": Family(deci),
    "internlm": Family(internlm, defaults={"bias": True}),
    "internlm2": Family(internlm, defaults={"bias": True}),
    "minicpm": Family(minicpm, defaults={"tie_word_embeddings": True}, inert=frozenset({"mup_denominator"})),
    "nemotron-nas": Family(nemotron_nas),
    "qwen": Family(qwen, inert=QWEN),
}
"""Reader by model_type."""
