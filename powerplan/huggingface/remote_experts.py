"""Families of experts whose code is on the hub and not in transformers: Arctic, Grok, Klear, LongCat with n-grams."""

from __future__ import annotations

from msgspec.structs import replace

from powerplan.extras import Extra
from powerplan.ffn import MLP, MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family, keys
from powerplan.huggingface.dense import qwen_windows
from powerplan.huggingface.experts import Experts, Grouped, qwen_sparse
from powerplan.huggingface.latent import LONGCAT, longcat_flash
from powerplan.huggingface.mixed import MIMO, mimo_v2_flash
from powerplan.spec import Layer, ModelSpec, Norm


def arctic(config: Config, name: str) -> ModelSpec:
    """Snowflake Arctic: experts in every moe_layer_frequency-th layer, and beside them an MLP as wide as the model.

    The MLP reads the output of attention and has a norm of its own; here it is a shared expert, of as many weights.
    """
    hidden, width = config.integer("hidden_size"), config.integer("intermediate_size")
    step = config.integer("moe_layer_frequency", default=2)
    residual = config.boolean("use_residual", False)
    experts = config.integer("num_local_experts")
    attention = parts.attention(config)
    moe = MoE(
        experts=experts,
        top_k=parts.experts_chosen(config, experts),
        intermediate_size=width,
        shared_intermediate_size=hidden if residual else 0,
    )
    sparse = Layer(mixer=attention, ffn=moe, norms=3 if residual else None)
    dense = Layer(mixer=attention, ffn=MLP(intermediate_size=width))
    layers = [dense if (index + 1) % step else sparse for index in range(config.layer_count)]
    return parts.assemble(config, name, layers)


def grok(config: Config, name: str) -> ModelSpec:
    """Grok 1 and 2: four norms a layer, gated experts. Grok 2 has a dense MLP beside them (residual_moe).

    Embeddings of Grok 1 are tied, those of Grok 2 are not, where the file does not say. The file of Grok 2 gives git
    for its model_type. Grok 2 has 269,515,497,472 parameters.
    """
    residual = config.boolean("residual_moe", False)
    experts = config.integer("num_local_experts", "num_experts")
    width = config.integer("intermediate_size")
    moe = MoE(
        experts=experts,
        top_k=parts.experts_chosen(config, experts),
        intermediate_size=config.optional_integer("moe_intermediate_size") or width,
        shared_intermediate_size=width if residual else 0,
    )
    window = config.data.get("sliding_window_size")
    if window not in (None, -1, 0):
        raise config.error(
            "sliding_window_size is not supported: no published Grok has a window", "sliding_window_size"
        )
    layer = Layer(mixer=parts.attention(config), ffn=moe)
    return parts.assemble(config, name, [layer] * config.layer_count, norm=Norm(per_layer=4), tie=not residual)


def klear(config: Config, name: str) -> ModelSpec:
    """Klear: Qwen 3 MoE with a router bias, and shared experts that are weighed against the routed ones by a layer."""
    read = Grouped(Experts(shared="n_shared_experts", router_bias=True), sparse=qwen_sparse, heads={"qk_norm": "head"})
    mix = (Extra(name="mix of experts", vectors=2, matmul=True), Extra(name="mix of experts bias", elements=2))
    if set(qwen_windows(config)) != {None}:
        raise config.error("use_sliding_window is not supported: no published Klear has it", "use_sliding_window")
    spec = read(config, name)
    return spec.map_layers(lambda layer: replace(layer, extras=mix) if isinstance(layer.ffn, MoE) else layer)


def longcat_ngram(config: Config, name: str) -> ModelSpec:
    """LongCat-Flash-Lite: LongCat-Flash, and tables of the 2- to emb_neighbor_num-grams that end in a token.

    Each length has emb_split_num tables, the i-th of all with ngram_vocab_size_ratio x vocabulary + 2i + 1 rows; a row
    is hidden_size over the number of tables wide, and is projected to hidden_size. mlx-lm, longcat_flash_ngram.py.
    """
    spec = longcat_flash(config, name)
    neighbours, split = config.integer("emb_neighbor_num", low=2), config.integer("emb_split_num")
    tables = split * (neighbours - 1)
    ratio = config.integer("ngram_vocab_size_ratio")
    width = spec.hidden_size // tables
    if width < 1:
        problem = f"emb_split_num {split} makes {tables} tables of a hidden_size of {spec.hidden_size}"
        raise config.error(problem, "emb_split_num")
    rows = tables * (ratio * spec.vocab_size + tables)
    extras = (
        Extra(name="n-gram tables", elements=rows * width, lookup=True),
        Extra(name="n-gram projections", vectors=tables * width, matmul=True),
    )
    config.note("longcat_flash_ngram: the n-grams of a token are looked up in tables, which count like an embedding")
    return replace(spec, extras=extras)


ARCTIC = keys("enable_expert_tensor_parallelism moe_eval_capacity_factor moe_min_capacity moe_token_dropping")
ARCTIC |= keys("moe_train_capacity_factor parallel_attn_mlp_res quantization")
GROK = keys(
    """
    attn_logit_softcapping attn_output_multiplier attn_temperature_len embedding_multiplier_scale global_attn_every_n
    max_attn_value max_attn_val output_multiplier_scale router_logit_softcapping rope_type
    """
)

FAMILIES: dict[str, Family] = {
    "Klear": Family(klear, defaults={"max_window_layers": 0, "decoder_sparse_step": 1}, inert=keys("coefficient")),
    "arctic": Family(arctic, inert=ARCTIC),
    "grok-1": Family(grok, inert=GROK),
    "longcat_flash_ngram": Family(longcat_ngram, like="longcat_flash", inert=LONGCAT),
    "mimo_v2": Family(
        mimo_v2_flash, like="mimo_v2_flash", inert=MIMO | keys("audio_config processor_config vision_config")
    ),
}
"""Reader by model_type."""
