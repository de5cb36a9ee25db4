"""Dense families whose code is on the hub and not in transformers; each count was checked against a published one."""

from __future__ import annotations

from functools import partial
from typing import Any

from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family
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
    padded = config.optional_integer("padded_vocab_size")
    if padded is not None and config.has("vocab_size") and padded != config.integer("vocab_size"):
        raise config.error(f"padded_vocab_size is {padded:,}, and vocab_size another", "padded_vocab_size")
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


QWEN = frozenset(
    ["bf16", "fp16", "fp32", "onnx_safe", "softmax_in_fp32", "use_dynamic_ntk", "use_logn_attn", "use_cache_kernel"]
)
CHATGLM = frozenset(
    [
        "apply_query_key_layer_scaling",
        "bias_dropout_fusion",
        "boi_token_id",
        "eoi_token_id",
        "pre_seq_len",
        "prefix_projection",
        "vision_config",
    ]
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
    "exaone": Family(llama, aliases={"num_hidden_layers": "num_layers"}),
    "internlm": Family(internlm, defaults={"bias": True}),
    "internlm2": Family(internlm, defaults={"bias": True}),
    "minicpm": Family(minicpm, defaults={"tie_word_embeddings": True}, inert=frozenset({"mup_denominator"})),
    "qwen": Family(qwen, inert=QWEN),
}
"""Reader by model_type."""
