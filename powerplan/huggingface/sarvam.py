"""Sarvam's models: the layers of GLM-4.5 and DeepSeek-V3, in files that also have the keys of their first code."""

from __future__ import annotations

from powerplan.huggingface.config import Config, Family
from powerplan.huggingface.experts import DEEPSEEK, Grouped, sparse_layers
from powerplan.huggingface.latent import MLA_KEYS, deepseek_v3
from powerplan.spec import ModelSpec

REFUSED_BIASES = {"use_bias": "transformers' sarvam_moe has biases on query, key and value alone"}
READ_MOE = Grouped(DEEPSEEK, sparse=sparse_layers, biases="qkv", normed="use_qk_norm", refuses=REFUSED_BIASES)


def sarvam_moe(config: Config, name: str) -> ModelSpec:
    """Sarvam 30B: GLM-4.5's layers, with qk-norm per head unless stated; all of a head is rotated."""
    _check_first_keys(config)
    return READ_MOE(config, name)


def sarvam_mla(config: Config, name: str) -> ModelSpec:
    """Sarvam 105B: DeepSeek-V3's layers, whose queries have no latent unless stated."""
    _check_first_keys(config)
    if config.has("q_head_dim"):
        parts = [config.integer(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
        config.derived("q_head_dim", sum(parts), "qk_nope_head_dim + qk_rope_head_dim")
    return deepseek_v3(config, name)


def _check_first_keys(config: Config) -> None:
    """Refuse what Sarvam's first code could say and transformers' cannot: other shared experts, no router bias."""
    if not config.boolean("moe_router_enable_expert_bias", True):
        key = "moe_router_enable_expert_bias"
        raise config.error(f"{key} false is not supported: transformers' {config.family} always has that bias", key)
    if config.has("moe_shared_expert_intermediate_size"):
        config.derived(
            "moe_shared_expert_intermediate_size", config.integer("moe_intermediate_size"), "moe_intermediate_size"
        )


FAMILIES: dict[str, Family] = {
    "sarvam_mla": Family(sarvam_mla, inert=MLA_KEYS),
    "sarvam_moe": Family(
        sarvam_moe,
        inert=frozenset({"max_window_layers"}),
        aliases={"n_shared_experts": "num_shared_experts", "attention_bias": "use_qkv_bias"},
    ),
}
"""Reader by model_type."""
