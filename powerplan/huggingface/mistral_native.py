"""Mistral's own params.json, which states all sizes: dense models, Mixtral, Mistral Large 3 with latent attention."""

from __future__ import annotations

from powerplan.ffn import MLP, MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import MAX_CONFIG_LAYERS, Config, Family, keys
from powerplan.mixers import AnyMixer, Attention
from powerplan.spec import Layer, ModelSpec, group_layers

NAME = "params.json"
"""What messages call the family, whose files have no model_type."""


SIZES = {"dim", "n_layers", "n_heads", "hidden_dim"}


def is_mistral_native(data: object) -> bool:
    """Return whether a file has the content of Mistral's params.json; Llama's leaves out the width of its MLP."""
    return isinstance(data, dict) and "model_type" not in data and {*data} >= SIZES


def mistral_native(config: Config, name: str) -> ModelSpec:
    """Read params.json: head_dim and kv heads, or the sizes of latent attention; `moe` has those of experts."""
    count = config.integer("n_layers", high=MAX_CONFIG_LAYERS)
    config.refuse("use_biases", "no published Mistral has biases")
    mixer, moe = _mixer(config), config.nested("moe")
    layers = [Layer(mixer=mixer, ffn=MLP(intermediate_size=config.integer("hidden_dim")))] * count
    if moe is not None:
        if moe.integer("route_every_n", default=1) != 1:
            raise moe.error("route_every_n is not 1, as in every published Mistral", "route_every_n")
        first = moe.optional_integer("first_k_dense_replace", low=0) or 0
        experts = moe.integer("num_experts")
        width = moe.integer("expert_hidden_dim", default=config.integer("hidden_dim"))
        routed = MoE(
            experts=experts,
            top_k=parts.experts_chosen(moe, experts),
            intermediate_size=width,
            shared_intermediate_size=width * (moe.optional_integer("num_shared_experts", low=0) or 0),
        )
        layers = layers[:first] + [Layer(mixer=mixer, ffn=routed)] * max(0, count - first)
    if config.data.get("vision_encoder"):
        config.note("params.json: the text decoder alone is counted, other towers and projectors are not")
    if config.data.get("quantization"):
        config.note("quantization of params.json is not read: bytes follow the dtype")
    if config.has("yarn"):
        config.note("RoPE is left out: yarn of params.json is not read")
    return ModelSpec(
        name=name,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("dim"),
        tie_embeddings=config.boolean("tied_embeddings", False),
        layers=group_layers(layers),
    )


def _mixer(config: Config) -> AnyMixer:
    heads = config.integer("n_heads")
    if config.has("kv_lora_rank"):
        parts.look_up(config, "n_kv_heads", "head_dim")
        latent = parts.mla(_with_heads(config, heads))
        config.data.looked_up.update(LATENT)
        return latent
    groups = config.optional_integer("n_kv_heads") or heads
    config.check_divides("n_kv_heads", groups, "n_heads", heads)
    dim = config.optional_integer("head_dim") or config.integer("dim") // heads
    return Attention(heads=heads, kv_heads=groups, head_dim=dim, window=config.optional_integer("sliding_window"))


LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _with_heads(config: Config, heads: int) -> Config:
    """Return the config with the number of heads under the name that other files have for it."""
    return Config(config.document, config.prefix, {**dict(config.data), "num_attention_heads": heads}, config.notes)


FAMILY = Family(
    mistral_native,
    inert=keys(
        """
        causal expert_model_parallel expert_parallel llama_4_scaling max_batch_size model_parallel norm_eps
        num_expert_groups num_expert_groups_per_tok quantization routed_scale vision_encoder yarn
        """
    ),
)
