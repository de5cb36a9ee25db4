"""Families like Llama: every layer is attention and a dense MLP, with RMSNorm or LayerNorm and rotated positions.

`dense` reads them all; a row of FAMILIES says how a family differs from Llama 3. Only what a row cannot say is code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from powerplan.errors import shown
from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family, keys
from powerplan.huggingface.rope_styles import rotated_layers
from powerplan.mixers import AnyMixer, Power
from powerplan.mixers.power import MAX_DEGREE
from powerplan.spec import Layer, ModelSpec, Norm

LAYERNORM = Norm(kind="layernorm")
PARALLEL = Norm(kind="layernorm", per_layer=1, bias=False)
"""Cohere's norm: one for attention and MLP side by side, without biases."""

Windows = Callable[[Config], list[int | None]]
"""Returns the window of each layer in tokens, None for full attention."""


def full(config: Config) -> list[int | None]:
    """No windows, whatever sliding_window says, as the code does not look at it; layer_types of the file hold."""
    window = config.optional_integer("sliding_window")
    return parts.windows_of(config, window, [parts.FULL] * config.layer_count, applied=False)


def qwen_windows(config: Config) -> list[int | None]:
    """Windows of Qwen 2 and 3: only with use_sliding_window, and then from layer max_window_layers on."""
    window = config.optional_integer("sliding_window")
    if not config.boolean("use_sliding_window", False):
        window = None
    first = config.integer("max_window_layers", low=0)
    count = config.layer_count
    full = count if window is None else min(first, count)
    return parts.windows_of(config, window, [parts.FULL] * full + [parts.SLIDING] * (count - full))


def alternating(config: Config, period: int) -> list[int | None]:
    """Windows in all layers but the last of each period; older files state the period as sliding_window_pattern."""
    return parts.alternating_windows(config, config.optional_integer("sliding_window_pattern") or period)


def after_full(config: Config) -> list[int | None]:
    """Windows in all layers but the first of each four (CWM, Granite SWA)."""
    window = config.optional_integer("sliding_window")
    types = [parts.SLIDING if index % 4 else parts.FULL for index in range(config.layer_count)]
    return parts.windows_of(config, window, types)


def same_window(config: Config) -> list[int | None]:
    """A window in every layer unless sliding_window is null; the code reads layer_types (Ministral)."""
    window = config.optional_integer("sliding_window")
    return parts.windows_of(config, window, [parts.SLIDING if window else parts.FULL] * config.layer_count)


def stated_types(config: Config) -> list[int | None]:
    """Windows in the layers that layer_types names, and in none without it (Cohere Compass)."""
    window = config.optional_integer("sliding_window")
    return parts.windows_of(config, window, [parts.FULL] * config.layer_count)


def smollm3_windows(config: Config) -> list[int | None]:
    """Windows in the layers without positions, with use_sliding_window alone."""
    count, window = config.layer_count, config.optional_integer("sliding_window")
    if not config.boolean("use_sliding_window", False):
        window = None
    rotated = rotated_layers(config, count)
    types = [parts.SLIDING if window and not rotated[index] else parts.FULL for index in range(count)]
    stated = parts.layer_types(config, types, (parts.FULL, parts.SLIDING))
    return [window if layer_type == parts.SLIDING else None for layer_type in stated]


def exaone4_windows(config: Config) -> list[int | None]:
    """Windows in all layers but the last of each period; none where sliding_window is null.

    The published files write the period as a word, such as LLLG: L is local, G is global attention.
    """
    count, window = config.layer_count, config.optional_integer("sliding_window")
    pattern = config.value("sliding_window_pattern") or 0
    if isinstance(pattern, str) and pattern and not set(pattern) - set("LG"):
        types = [parts.SLIDING if pattern[index % len(pattern)] == "L" else parts.FULL for index in range(count)]
    elif isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 0:
        types = [parts.SLIDING if pattern and (index + 1) % pattern else parts.FULL for index in range(count)]
    else:
        problem = f"sliding_window_pattern must be an integer or a word of L and G, and is {shown(pattern)}"
        raise config.error(problem, "sliding_window_pattern")
    return parts.windows_of(config, window, types if window else [parts.FULL] * count)


def layered(
    config: Config, name: str, mixers: Sequence[AnyMixer], *, gated: bool = True, bias: bool = False, **fields: Any
) -> ModelSpec:
    """Return a model of `mixers`, each followed by the same MLP."""
    mlp = MLP(intermediate_size=config.integer("intermediate_size"), gated=gated, bias=bias)
    by_mixer = {mixer: Layer(mixer=mixer, ffn=mlp) for mixer in set(mixers)}
    return parts.assemble(config, name, [by_mixer[mixer] for mixer in mixers], **fields)


def dense(
    config: Config,
    name: str,
    *,
    windows: Windows = full,
    bias: str | bool = "attention_bias",
    covers: Literal[True, "qkv"] = True,
    mlp_bias: str | bool = False,
    qk_norm: Literal["none", "head", "full"] = "none",
    sinks: bool = False,
    gated: bool = True,
    norm: Norm | None = None,
    refused: Sequence[tuple[str, str]] = (),
) -> ModelSpec:
    """Return the spec of a family of attention and dense MLPs.

    bias, mlp_bias: the flag of the file for biases of attention and of the MLP, or whether the code always has them.
    covers: the projections that a bias of attention is on. refused: keys that would change the structure, and why.
    """
    for key, because in refused:
        config.refuse(key, because)
    on_attention = config.boolean(bias, False) if isinstance(bias, str) else bias
    on_mlp = config.boolean(mlp_bias, False) if isinstance(mlp_bias, str) else mlp_bias
    heads: dict[str, Any] = {"bias": covers if on_attention else False, "qk_norm": qk_norm, "sinks": sinks}
    mixers = parts.attention_layers(config, windows(config), **heads)
    return layered(config, name, mixers, gated=gated, bias=on_mlp, norm=norm or Norm())


def seed_oss(config: Config, name: str) -> ModelSpec:
    """Seed-OSS: attention_bias on query, key and value, attention_out_bias on the output."""
    inner, outer = config.boolean("attention_bias", True), config.boolean("attention_out_bias", False)
    return _two_biases(config, name, inner, outer, config.boolean("mlp_bias", False))


def internlm3(config: Config, name: str) -> ModelSpec:
    """InternLM 3: qkv_bias on query, key and value, bias on the output and the MLP."""
    inner, outer = config.boolean("qkv_bias", False), config.boolean("bias", False)
    return _two_biases(config, name, inner, outer, outer)


def _two_biases(config: Config, name: str, inner: bool, outer: bool, mlp_bias: bool) -> ModelSpec:
    bias = "qkv" if inner and not outer else "output" if outer and not inner else inner
    return layered(config, name, parts.attention_layers(config, full(config), bias=bias), bias=mlp_bias)


def helium(config: Config, name: str) -> ModelSpec:
    """Helium: the output projection is hidden_size wide, and so must the heads together be."""
    heads = parts.attention(config)
    hidden = config.integer("hidden_size")
    if heads.heads * heads.head_dim != hidden:
        problem = f"head_dim {heads.head_dim} times {heads.heads} heads is not hidden_size {hidden}"
        raise config.error(f"{problem}, as Helium's output projection needs", "head_dim")
    return dense(config, name, covers="qkv", mlp_bias="mlp_bias")


def stablelm(config: Config, name: str) -> ModelSpec:
    """StableLM: LayerNorm; one norm a layer with use_parallel_residual; norms of each head's own with qk_layernorm."""
    norms = 1 if config.boolean("use_parallel_residual", False) else 2
    qk_norm: Any = "full" if config.boolean("qk_layernorm", False) else "none"
    norm = Norm(kind="layernorm", per_layer=norms)
    return dense(config, name, bias="use_qkv_bias", covers="qkv", qk_norm=qk_norm, norm=norm)


def hyperclovax(config: Config, name: str) -> ModelSpec:
    """HyperCLOVA X: norms after attention and MLP as well, with use_post_norm."""
    norm = Norm(per_layer=4 if config.boolean("use_post_norm", True) else 2)
    return dense(config, name, mlp_bias="mlp_bias", norm=norm)


def hunyuan(config: Config, name: str) -> ModelSpec:
    """Hunyuan's dense models: qk-norm per head."""
    config.refuse("use_cla", "keys and values shared between layers are not counted")
    if (config.optional_integer("num_experts") or 1) > 1:
        raise config.error("num_experts above 1 is not supported: hunyuan_v1_dense has none", "num_experts")
    return dense(config, name, qk_norm="head")


def cohere(config: Config, name: str) -> ModelSpec:
    """Command R: attention and MLP side by side; with use_qk_norm a norm of each head's own."""
    qk_norm: Any = "full" if config.boolean("use_qk_norm", False) else "none"
    return dense(config, name, qk_norm=qk_norm, norm=PARALLEL)


def gemma(config: Config, name: str) -> ModelSpec:
    """Gemma: heads of 256, tied. PaliGemma lets the prompt's tokens see each other both ways."""
    _causal(config)
    return dense(config, name)


def gemma2(config: Config, name: str) -> ModelSpec:
    """Gemma 2: windows in every other layer from the first on, four norms a layer, tied."""
    _causal(config)
    return dense(config, name, windows=partial(parts.alternating_windows, period=2), norm=Norm(per_layer=4))


def _causal(config: Config) -> None:
    """Refuse use_bidirectional_attention, but for a text decoder in a wrapper, where it is for the prompt alone."""
    if not config.prefix:
        config.refuse("use_bidirectional_attention", "powerplan counts causal attention")
    elif config.boolean("use_bidirectional_attention", False):
        config.note(f"{config.family}: tokens of a prompt see each other both ways; causal attention is counted")


def phi3(config: Config, name: str) -> ModelSpec:
    """Phi-3 and Phi-4-mini: no biases; a window in every layer if there is one."""
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.refuse(key, "transformers' Phi-3 has no biases")
    return dense(config, name, windows=parts.one_window, bias=False)


def gemma3(config: Config, name: str) -> ModelSpec:
    """Gemma 3 text decoder: full attention in every sixth layer, qk-norm per head, four norms a layer, tied."""
    config.refuse("use_bidirectional_attention", "powerplan counts causal attention")
    windows = partial(alternating, period=6)
    return dense(config, name, windows=windows, qk_norm="head", norm=Norm(per_layer=4))


def powercoder(config: Config, name: str) -> ModelSpec:
    """PowerCoder: StarCoder 2 with power attention of degree 2 and a gate per key/value head in every layer.

    The degree is not in the file: it is that of the published code. chunk_size is that of its kernels.
    """
    config.refuse("sliding_window", "power attention keeps no window")
    bias = config.boolean("use_bias", True)
    mixers = [power(config, bias=bias)] * config.layer_count
    return layered(config, name, mixers, gated=False, bias=bias, norm=LAYERNORM, tie=True)


def power(config: Config, **fields: Any) -> Power:
    """Return power attention of the config's heads with a gate per key/value head; the degree is 2 unless stated."""
    heads = parts.attention(config)
    return Power(
        p=config.integer("deg", "power", default=2, high=MAX_DEGREE),
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        gated=True,
        chunk_size=config.optional_integer("chunk_size"),
        **fields,
    )


VISION = keys(
    """
    _flash_attn_2_enabled is_llama_config num_image_tokens perceiver_config pixel_shuffle_factor qk_layer_norms
    use_resampler
    """
)
"""Keys of text configs within wrappers (PaliGemma, Idefics 2 and 3, SmolVLM) that concern images."""

PHI = frozenset({"full_attn_mod", "interpolate_factor"})
"""Keys of Phi-4-mini's files that its code does not read."""

COHERE = keys(
    """
    layer_switch order_of_interleaved_layers position_embedding_type use_embedding_sharing use_gated_activation
    use_parallel_block use_parallel_embedding
    """
)
"""Keys of Command R7B's files that say what its code does anyhow."""

HUNYUAN = keys(
    """
    add_classification_head cla_share_factor class_num dense_list im_end_id im_newline_id im_start_id mask_init_id
    norm_type org_vocab_size pad_id pool_type text_end_id text_start_id use_qk_norm use_rotary_pos_emb
    """
)
"""Keys of Hunyuan's files that its dense models share with others of the family, and their code does not read."""

llama = partial(dense, mlp_bias="mlp_bias")
qwen2 = partial(dense, windows=qwen_windows, bias=True, covers="qkv")
glm = partial(dense, covers="qkv")
glm4 = partial(glm, norm=Norm(per_layer=4))


def mimo(config: Config, name: str) -> ModelSpec:
    """MiMo 7B: Qwen 2, and layers that predict further tokens, which are not counted."""
    parts.note_prediction_layers(config, "num_nextn_predict_layers")
    return qwen2(config, name)


FAMILIES: dict[str, Family] = {
    "arcee": Family(partial(dense, mlp_bias="mlp_bias", gated=False)),
    "cohere": Family(cohere),
    "cohere2": Family(partial(dense, windows=partial(alternating, period=4), norm=PARALLEL), inert=COHERE),
    "cohere_compass_text": Family(partial(dense, windows=stated_types, norm=PARALLEL), inert=COHERE),
    "cwm": Family(partial(dense, windows=after_full, bias=False, mlp_bias="mlp_bias")),
    "emu3_text_model": Family(
        llama,
        defaults={
            "vocab_size": 184_622,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "ernie4_5": Family(partial(dense, bias="use_bias", mlp_bias="use_bias")),
    "exaone": Family(llama, aliases={"num_hidden_layers": "num_layers"}),
    "exaone4": Family(partial(dense, windows=exaone4_windows, bias=False, qk_norm="head")),
    "gemma": Family(gemma, inert=VISION),
    "gemma2": Family(gemma2, inert=VISION),
    "gemma3_text": Family(gemma3, inert=frozenset({"_sliding_window_pattern"})),
    "glm": Family(glm),
    "glm4": Family(glm4),
    "glm4v_text": Family(partial(glm4, bias=True)),
    "granite": Family(llama),
    "granite_swa": Family(partial(dense, windows=after_full, mlp_bias="mlp_bias", sinks=True)),
    "helium": Family(helium),
    "hunyuan_v1_dense": Family(hunyuan, inert=HUNYUAN, aliases={"head_dim": "attention_head_dim"}),
    "hyperclovax": Family(hyperclovax),
    "internlm3": Family(internlm3),
    "iquestcoder": Family(
        partial(llama, refused=[("use_sliding_window", "transformers' IQuest-Coder has no windows")])
    ),
    "jais2": Family(partial(dense, mlp_bias="mlp_bias", gated=False, norm=LAYERNORM)),
    "llama": Family(llama, inert=VISION),
    "ministral": Family(partial(dense, windows=same_window, bias=False)),
    "ministral3": Family(partial(dense, windows=parts.one_window, bias=False)),
    "mistral": Family(partial(dense, windows=parts.one_window, bias=False), inert=VISION),
    "nanochat": Family(partial(dense, gated=False, norm=Norm(kind="none"))),
    "nemotron": Family(
        partial(dense, mlp_bias="mlp_bias", gated=False, norm=LAYERNORM), inert=frozenset({"rope_percent"})
    ),
    "olmo": Family(partial(dense, norm=Norm(kind="none"))),
    "olmo2": Family(partial(dense, qk_norm="full")),
    "olmo3": Family(partial(dense, windows=partial(parts.alternating_windows, period=4), qk_norm="full")),
    "phi3": Family(phi3, inert=PHI),
    "mimo": Family(mimo, like="qwen2", inert=frozenset({"attention_bias", "use_mrope"})),
    "powercoder": Family(powercoder, like="starcoder2"),
    "qwen2": Family(qwen2),
    "qwen2_5_vl_text": Family(qwen2),
    "qwen2_vl_text": Family(qwen2),
    "qwen3": Family(partial(dense, windows=qwen_windows, qk_norm="head")),
    "qwen3_vl_text": Family(partial(dense, qk_norm="head")),
    "seed_oss": Family(seed_oss),
    "smollm3": Family(
        partial(dense, windows=smollm3_windows, mlp_bias="mlp_bias"), inert=frozenset({"max_window_layers"})
    ),
    "stablelm": Family(stablelm, inert=frozenset({"rotary_scaling_factor"})),
    "starcoder2": Family(
        partial(dense, windows=parts.one_window, bias="use_bias", mlp_bias="use_bias", gated=False, norm=LAYERNORM)
    ),
    "vaultgemma": Family(partial(dense, windows=partial(parts.alternating_windows, period=2))),
}
"""Reader by model_type."""
