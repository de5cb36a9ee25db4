"""Families like GPT-2: multi-head or multi-query attention of hidden_size, a plain MLP, LayerNorm, mostly biases."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from powerplan.errors import shown
from powerplan.extras import Extra
from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import MAX_CONFIG_LAYERS, Config, Family, keys
from powerplan.huggingface.dense import LAYERNORM
from powerplan.mixers import Attention
from powerplan.spec import Layer, ModelSpec, Norm

ONE_NORM = Norm(kind="layernorm", per_layer=1)


def heads(config: Config, kv_heads: int | None = None, **fields: Any) -> Attention:
    """Return attention with `kv_heads` key/value heads, as many as query heads where left out."""
    _hidden(config)
    attention = parts.attention(config, **fields)
    return replace(attention, kv_heads=kv_heads or attention.heads)


def _hidden(config: Config) -> int:
    return config.integer(config.aliases.get("hidden_size", "hidden_size"), "hidden_size", "n_embd")


def gpt(
    config: Config,
    name: str,
    *,
    attention: Attention | None = None,
    bias: Any = True,
    inner: Sequence[str] = ("n_inner",),
    times: int = 4,
    mlp_bias: bool = True,
    norm: Norm = LAYERNORM,
    positions: int | None = None,
    lm_head_bias: bool = False,
    extras: tuple[Extra, ...] = (),
) -> ModelSpec:
    """Return a model of equal layers.

    attention: the attention, else multi-head attention with `bias`. inner: keys of the MLP's width, which is `times`
    the hidden size where the file has none of them. positions: rows of a learned table beyond those of the keys
    n_positions or max_position_embeddings, None where positions are rotated, sinusoidal or biases. extras: those of
    each layer.
    """
    hidden = _hidden(config)
    width = config.integer(*inner, default=times * hidden or None) if inner else times * hidden
    mlp = MLP(intermediate_size=width, gated=False, bias=mlp_bias)
    layer = Layer(mixer=attention or heads(config, bias=bias), ffn=mlp, extras=extras)
    fields: dict[str, Any] = {"norm": norm, "tie": True, "extras": (parts.head_bias(config),) if lm_head_bias else ()}
    if positions is not None:
        table = config.integer("n_positions", "max_position_embeddings", "n_ctx", default=1024)
        fields["position_embeddings"] = table + positions
    return parts.assemble(config, name, [layer] * config.layer_count, **fields)


def gpt2(config: Config, name: str) -> ModelSpec:
    """GPT-2: learned positions, biases everywhere; SantaCoder has one key/value head (multiquery)."""
    multiquery = config.word("attention_head_type", ("multihead", "multiquery")) == "multiquery"
    return gpt(config, name, attention=heads(config, 1 if multiquery else None, bias=True), positions=0)


def gpt_bigcode(config: Config, name: str) -> ModelSpec:
    """GPTBigCode (StarCoder): GPT-2 with one key/value head unless multi_query is false."""
    multiquery = config.boolean("multi_query", True)
    return gpt(config, name, attention=heads(config, 1 if multiquery else None, bias=True), positions=0)


def gpt_neox(config: Config, name: str) -> ModelSpec:
    """GPT-NeoX: two norms a layer, in parallel or not; attention_bias on all projections of attention."""
    bias = config.boolean("attention_bias", True)
    return gpt(config, name, bias=bias, inner=("intermediate_size",), times=0)


def gpt_neox_japanese(config: Config, name: str) -> ModelSpec:
    """GPT-NeoX Japanese: no biases but one on the output of the last attention."""
    mlp = MLP(intermediate_size=config.multiple("intermediate_multiple_size", 4, of=config.integer("hidden_size")))
    attention = heads(config)
    mlp = replace(mlp, gated=False)
    layers = [Layer(mixer=attention, ffn=mlp)] * (config.layer_count - 1)
    layers.append(Layer(mixer=replace(attention, bias="output"), ffn=mlp))
    return parts.assemble(config, name, layers, norm=LAYERNORM, tie=True)


def gpt_neo(config: Config, name: str) -> ModelSpec:
    """GPT-Neo: attention_types repeats kinds of layers, global or local; local ones see window_size keys."""
    count = config.layer_count
    kinds = _attention_kinds(config)
    if len(kinds) != count:
        raise config.error(f"attention_types make {len(kinds)} layers, and num_layers is {count}", "attention_types")
    hidden, window = config.integer("hidden_size"), config.integer("window_size", default=256)
    mlp = MLP(intermediate_size=config.integer("intermediate_size", default=4 * hidden), gated=False, bias=True)
    full = heads(config, bias="output")
    layers = {
        "global": Layer(mixer=full, ffn=mlp),
        "local": Layer(mixer=replace(full, window=window), ffn=mlp),
    }
    positions = config.integer("max_position_embeddings", default=2048)
    chosen = [layers[kind] for kind in kinds]
    return parts.assemble(config, name, chosen, norm=LAYERNORM, tie=True, position_embeddings=positions)


def _attention_kinds(config: Config) -> list[str]:
    """Return global or local for each layer: [[[kinds], times], ...] written out, attention_layers beside it agrees."""
    stated = config.data.get("attention_types")
    if stated is None:
        stated = [[["global", "local"], 12]]
    kinds: list[str] = []
    for item in stated if isinstance(stated, list) else [stated]:
        some, times = item if isinstance(item, list) and len(item) == 2 else (None, 0)
        pairs = isinstance(some, list) and all(kind in ("global", "local") for kind in some)
        if not pairs or type(times) is not int or not 0 <= times <= MAX_CONFIG_LAYERS:
            problem = f"attention_types must be pairs of kinds (global, local) and times, and has {shown(item)}"
            raise config.error(problem, "attention_types")
        kinds += [str(kind) for kind in some or ()] * times
    layers = config.strings("attention_layers")
    if layers is not None and layers != kinds:
        raise config.error("attention_layers are others than attention_types make", "attention_layers")
    return kinds


def opt(config: Config, name: str) -> ModelSpec:
    """OPT: learned positions with two rows more, and a final norm only where norms stand before attention."""
    hidden = config.integer("hidden_size")
    width = config.optional_integer("word_embed_proj_dim") or hidden
    if width != hidden:
        problem = f"word_embed_proj_dim {width:,} is not supported: embeddings are as wide as hidden_size {hidden:,}"
        raise config.error(problem, "word_embed_proj_dim")
    bias = config.boolean("enable_bias", True)
    final = config.boolean("do_layer_norm_before", True) and not config.boolean("_remove_final_layer_norm", False)
    affine = config.boolean("layer_norm_elementwise_affine", True)
    norm = Norm(kind="layernorm" if affine else "none", final=final)
    return gpt(config, name, bias=bias, mlp_bias=bias, inner=("ffn_dim",), norm=norm, positions=2)


def bloom(config: Config, name: str) -> ModelSpec:
    """BLOOM: ALiBi, a norm after the embedding."""
    _n_embed(config)
    return gpt(config, name, inner=(), norm=Norm(kind="layernorm", embedding=True))


def _n_embed(config: Config) -> None:
    """Let n_embed of older files stand for hidden_size. InputError where both are there and differ."""
    older = config.optional_integer("n_embed")
    if older is None:
        return
    if config.has("hidden_size") and config.integer("hidden_size") != older:
        raise config.error(f"n_embed is {older:,} and hidden_size {config.integer('hidden_size'):,}", "n_embed")
    config.aliases = {**config.aliases, "hidden_size": "n_embed"}


def falcon(config: Config, name: str) -> ModelSpec:
    """Falcon: num_kv_heads with new_decoder_architecture, else one key/value head with multi_query, else all of them.

    A layer has two norms without parallel_attn, or with num_ln_in_parallel_attn 2, which the new architecture means
    where the file says nothing.
    """
    _n_embed(config)
    config.refuse("apply_residual_connection_post_layernorm", "transformers' Falcon has none of it")
    new = config.boolean("new_decoder_architecture", False)
    groups = config.optional_integer("num_kv_heads")
    kv_heads = groups if new else 1 if config.boolean("multi_query", True) else None
    norms = config.optional_integer("num_ln_in_parallel_attn", high=2) or (2 if new else 1)
    if not config.boolean("parallel_attn", True):
        norms = 2
    bias = config.boolean("bias", False)
    attention = heads(config, kv_heads, bias=bias)
    norm = Norm(kind="layernorm", per_layer=norms)
    return gpt(config, name, attention=attention, inner=("ffn_hidden_size",), mlp_bias=bias, norm=norm)


def mpt(config: Config, name: str) -> ModelSpec:
    """MPT: ALiBi, norms and projections without biases, an MLP of four times the width, as transformers builds it."""
    if not config.boolean("no_bias", True):
        raise config.error("no_bias false is not supported: transformers' MPT has no biases", "no_bias")
    if config.integer("expansion_ratio", default=4) != 4:
        raise config.error("expansion_ratio must be 4, as transformers' MPT has it", "expansion_ratio")
    config.word("norm_type", ("low_precision_layernorm", "layernorm"))
    attention = config.nested("attn_config")
    if attention is not None:
        attention.word("attn_type", ("multihead_attention",))
        attention.refuse("qk_ln", "transformers' MPT has no norms of queries and keys")
        attention.refuse("prefix_lm", "powerplan counts causal attention")
        if not attention.boolean("alibi", True):
            raise attention.error("alibi false is not supported: transformers' MPT always has it", "alibi")
    norm = Norm(kind="layernorm", bias=False)
    return gpt(config, name, bias=False, mlp_bias=False, inner=(), norm=norm)


def phi(config: Config, name: str) -> ModelSpec:
    """Phi 1 to 2: attention and MLP side by side after one norm; a bias on the LM head."""
    attention, biases = _qk_layernorm(config, parts.attention(config, bias=True))
    width = ("intermediate_size",)
    return gpt(config, name, attention=attention, inner=width, times=0, norm=ONE_NORM, lm_head_bias=True, extras=biases)


def persimmon(config: Config, name: str) -> ModelSpec:
    """Persimmon, and Fuyu's text decoder: multi-head attention, biases everywhere."""
    attention, biases = _qk_layernorm(config, heads(config, bias=True))
    return gpt(config, name, attention=attention, inner=("intermediate_size",), times=0, extras=biases)


def _qk_layernorm(config: Config, attention: Attention) -> tuple[Attention, tuple[Extra, ...]]:
    """Return the attention with LayerNorms of queries and keys where qk_layernorm says so, and their biases."""
    if not config.boolean("qk_layernorm", False):
        return attention, ()
    return replace(attention, qk_norm="head"), (Extra(name="qk-norm biases", elements=2 * attention.head_dim),)


BLOOM = frozenset(
    {"bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv"}
)
MPT = keys(
    """
    alibi_bias_max attn_impl attn_uses_sequence_id init_config learned_pos_emb softmax_scale tokenizer_name verbose
    """
)
STARCODER = keys(
    """
    inference_runner max_batch_size pad_key_length pre_allocate_kv_cache validate_runner_input
    """
)
CONTEXT = frozenset({"n_ctx", "n_positions"})

FAMILIES: dict[str, Family] = {
    "biogpt": Family(
        partial(gpt, inner=("intermediate_size",), times=0, positions=2), defaults={"max_position_embeddings": 1024}
    ),
    "bloom": Family(bloom, inert=BLOOM),
    "codegen": Family(partial(gpt, bias=False, norm=ONE_NORM, lm_head_bias=True), inert=CONTEXT),
    "ctrl": Family(partial(gpt, inner=("dff",), lm_head_bias=True), inert=CONTEXT | {"from_tf", "output_past"}),
    "falcon": Family(falcon, inert=frozenset({"alibi", "ff_factor"})),
    "gpt-sw3": Family(gpt2, inert=CONTEXT),
    "gpt2": Family(gpt2, inert=CONTEXT),
    "gpt_bigcode": Family(gpt_bigcode, inert=STARCODER),
    "gpt_neo": Family(gpt_neo),
    "gpt_neox": Family(gpt_neox),
    "gpt_neox_japanese": Family(gpt_neox_japanese),
    "gptj": Family(partial(gpt, bias=False, norm=ONE_NORM, lm_head_bias=True), inert=frozenset({"n_positions"})),
    "mpt": Family(mpt, inert=MPT),
    "openai-gpt": Family(
        partial(gpt, inner=(), norm=Norm(kind="layernorm", final=False), positions=0),
        inert=CONTEXT | {"n_special", "predict_special_tokens"},
    ),
    "opt": Family(
        opt, defaults={"max_position_embeddings": 2048}, inert=frozenset({"learned_embeddings", "scale_embeddings"})
    ),
    "persimmon": Family(persimmon),
    "phi": Family(phi),
    "xglm": Family(partial(gpt, inner=("ffn_dim",))),
}
"""Reader by model_type."""
