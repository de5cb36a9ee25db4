"""How the files of each family say their RoPE: the keys of its base, and which of its layers are rotated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from powerplan.ffn import MLP
from powerplan.huggingface.config import Config, keys
from powerplan.spec import Layer

FULL, SLIDING, MAIN, COMPRESS = "full_attention", "sliding_attention", "main", "compress"
LABELS = frozenset({FULL, SLIDING, MAIN, COMPRESS, "chunked_attention", "linear_attention"})
"""Kinds of layers that rope_parameters may have settings of their own for."""

Rotates = Callable[[Config, int, Layer], bool]
"""Whether the layer at an index, which is read as that, is rotated."""


@dataclass(frozen=True)
class Style:
    """How files of a family say their RoPE.

    bases: the key of the base, for each kind of layer that has settings of its own; "" stands for all layers, and an
    empty key for none. flat: the kinds that an object for all layers is for. rotates: the layers that are rotated.
    base, partial: what holds where neither the file nor transformers says it. contexts: the keys of the longest
    context, the first that the file has. attention_factor: that of YaRN, where the family's code fixes it.
    """

    bases: Mapping[str, str] = field(default_factory=lambda: {"": "rope_theta"})
    flat: tuple[str, ...] = ("",)
    rotates: Rotates | None = None
    base: float = 10_000
    partial: float = 1
    contexts: tuple[str, ...] = (
        *("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"),
        *("model_max_length", "n_ctx", "context_length"),
    )
    attention_factor: float | None = None


OWN_KEYS = keys(
    """
    compress_rope_theta global_rope_theta layer_rope_theta local_rope_theta no_rope_layer_interval no_rope_layers
    original_max_position_embeddings partial_rotary_factor partial_rotary_factors rope_local_base_freq
    rope_parameters rope_ratio rope_scaling rope_theta rotary rotary_dim rotary_emb_base rotary_pct swa_rope_theta
    use_mem_rope yarn_only_types
    """
)
"""Keys that are read here, in some family."""


def rotated_layers(config: Config, count: int) -> Sequence[int]:
    """Return no_rope_layers, 0 for each layer without RoPE; where there is none, every no_rope_layer_interval-th."""
    interval = config.integer("no_rope_layer_interval", default=4)
    rotated = config.integers("no_rope_layers") or [int((index + 1) % interval != 0) for index in range(count)]
    if len(rotated) < count:
        raise config.error(f"no_rope_layers has {len(rotated)} entries for {count} layers", "no_rope_layers")
    return rotated


def _listed(config: Config, index: int, layer: Layer) -> bool:
    return bool(rotated_layers(config, index + 1)[index])


def _sliding(config: Config, index: int, layer: Layer) -> bool:
    return layer.mixer is not None and layer.mixer.window_size is not None


def _sliding_if_any(config: Config, index: int, layer: Layer) -> bool:
    return _sliding(config, index, layer) or config.optional_integer("sliding_window") is None


def _sliding_or_dense(config: Config, index: int, layer: Layer) -> bool:
    """Command A MoE: a dense prefix of full attention is rotated too."""
    prefix = config.optional_integer("prefix_dense_sliding_window_pattern") == 1
    return _sliding(config, index, layer) or (prefix and isinstance(layer.ffn, MLP))


def _never(config: Config, index: int, layer: Layer) -> bool:
    return False


def _flag(name: str, rotates: Any, default: Any) -> Rotates:
    """Return whether layers are rotated where a key has a value; null and absence mean `default`."""

    def holds(config: Config, index: int, layer: Layer) -> bool:
        value = config.value(name)
        return bool((default if value is None else value) == rotates)

    return holds


def _layered(full: str, sliding: str, *flat: str, **fields: Any) -> Style:
    return Style(bases={FULL: full, SLIDING: sliding}, flat=flat or (FULL, SLIDING), **fields)


_SLIDING_ALONE = Style(rotates=_sliding)
_EMB_BASE = Style(bases={"": "rotary_emb_base"})

_NATIVE = ("max_position_embeddings", "max_seq_len", "model_max_length")
"""Keys of the longest context in Mistral's params.json."""

STYLES: dict[str, Style] = {
    **dict.fromkeys(("bloom", "cpmant", "ctrl", "jamba", "kimi_linear"), Style(rotates=_never)),
    **dict.fromkeys(("mpt", "nemotron_h", "xglm", "zamba"), Style(rotates=_never)),
    **dict.fromkeys(("afmoe", "cohere2", "flint", "lara_mini", "muse_glimmer_text", "muse_spark_text"), _SLIDING_ALONE),
    **dict.fromkeys(("exaone4", "exaone_moe", "kolibri1"), Style(rotates=_sliding_if_any)),
    **dict.fromkeys(("llama4_text", "smollm3"), Style(rotates=_listed)),
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), _layered("rope_theta", "rope_local_base_freq", FULL)),
    **dict.fromkeys(("dory", "gemma4_text", "gemma4_unified_text", "laguna", "lfm3", "mellum"), _layered("", "")),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), _EMB_BASE),
    "baichuan": Style(rotates=lambda config, index, layer: config.integer("hidden_size") == 4096),
    "chatglm": Style(partial=0.5, contexts=("seq_length",)),
    "cohere2_moe": Style(rotates=_sliding_or_dense),
    "deepseek_v4": Style(
        bases={MAIN: "rope_theta", COMPRESS: "compress_rope_theta"}, flat=(COMPRESS,), attention_factor=1.0
    ),
    "falcon": Style(rotates=_flag("alibi", False, False)),
    "forgetting_transformer": Style(rotates=_flag("use_rope", True, False)),
    "granitemoehybrid": Style(rotates=_flag("position_embedding_type", "rope", None)),
    "mimo_v2_flash": _layered("rope_theta", "swa_rope_theta"),
    "modernbert-decoder": _layered("global_rope_theta", "local_rope_theta"),
    "olmo3": _layered("rope_theta", "", FULL),
    "params.json": Style(rotates=lambda config, index, layer: not config.has("yarn"), contexts=_NATIVE),
    "qwen": Style(bases={"": "rotary_emb_base"}, contexts=("seq_length", "max_position_embeddings")),
    "zamba2": Style(rotates=_flag("use_mem_rope", True, False)),
}
"""Families whose files say it otherwise than Llama's."""
