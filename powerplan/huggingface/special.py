"""Families of dense layers that are neither Llama's nor GPT-2's: extra parameters, MLA, images."""

from __future__ import annotations

from msgspec.structs import asdict, replace

from powerplan.extras import Extra
from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family, keys
from powerplan.huggingface.dense import PHI, dense, phi3
from powerplan.huggingface.latent import MLA_KEYS
from powerplan.mixers import Attention
from powerplan.spec import Layer, ModelSpec, Norm


def with_extras(spec: ModelSpec, *extras: Extra) -> ModelSpec:
    """Return the spec with `extras` in every layer."""
    return spec.map_layers(lambda layer: replace(layer, extras=extras))


def apertus(config: Config, name: str) -> ModelSpec:
    """Apertus: qk-norm per head, a plain MLP whose activation xIELU has two learned numbers a layer."""
    if not config.boolean("qk_norm", True):
        raise config.error("qk_norm false is not supported: transformers' Apertus always has it", "qk_norm")
    for key in ("post_norm", "mlp_bias"):
        config.refuse(key, "transformers' Apertus has none")
    spec = dense(config, name, qk_norm="head", gated=False)
    learned = config.value("hidden_act") == "xielu"
    return with_extras(spec, Extra(name="xielu", elements=2)) if learned else spec


def apertus1p5(config: Config, name: str) -> ModelSpec:
    """Apertus 1.5: Apertus whose LM head has rows for the first output_vocab_size tokens alone, if that is stated.

    The other tokens, of images and audio, are input alone: their rows of the embedding are looked up, and vocab_size of
    the spec is the LM head's.
    """
    spec, kept = apertus(config, name), config.optional_integer("output_vocab_size")
    if kept is None or kept == spec.vocab_size:
        return spec
    if kept > spec.vocab_size:
        raise config.error(f"output_vocab_size {kept} is more than vocab_size {spec.vocab_size}", "output_vocab_size")
    if spec.tie_embeddings:
        problem = f"output_vocab_size {kept} is not the embedding's {spec.vocab_size}, which tie_word_embeddings needs"
        raise config.error(problem, "output_vocab_size")
    config.note(f"apertus1p5_text: {spec.vocab_size - kept:,} of {spec.vocab_size:,} tokens are input alone")
    rows = Extra(name="embedding of input tokens", vectors=spec.vocab_size - kept, lookup=True)
    return replace(spec, vocab_size=kept, extras=(rows,))


def bitnet(config: Config, name: str) -> ModelSpec:
    """BitNet: norms before the output projection of attention and of the MLP."""
    norms = Extra(name="sub-norms", vectors=1, elements=config.integer("intermediate_size"))
    return with_extras(dense(config, name), norms)


def diffllama(config: Config, name: str) -> ModelSpec:
    """DiffLlama: differential attention, with a norm of its output that has no parameters."""
    spec = dense(config, name)
    return spec.map_mixers(lambda mixer: Attention(**asdict(mixer) | {"differential": True}))


def doge(config: Config, name: str) -> ModelSpec:
    """Doge: scaled residuals, qk-norm per head, and a mask that the values of each key/value head make.

    The mask hides all but keep_window_size keys of a longer context; all of them stay in the cache, and count.
    """
    config.refuse("is_moe", "Doge's cross-domain experts are not counted")
    spec = dense(config, name, windows=parts.one_window, qk_norm="head", mlp_bias="mlp_bias")
    heads = parts.attention(config)
    groups = heads.kv_heads
    biases = groups if config.boolean("attention_bias", False) else 0
    config.note("doge: its dynamic mask hides keys beyond keep_window_size; all keys are counted")
    return with_extras(
        spec,
        Extra(name="residual scales", vectors=2),
        Extra(name="dynamic mask", elements=groups * groups * heads.head_dim, matmul=True),
        Extra(name="dynamic mask scales", elements=groups + biases),
    )


def latent(config: Config, name: str) -> ModelSpec:
    """MiniCPM 3 and Youtu: latent attention and dense MLPs; v_head_dim is that of plain heads where left out."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    config.defaults = {**config.defaults, "v_head_dim": config.default("v_head_dim") or hidden // heads}
    layer = Layer(mixer=parts.mla(config), ffn=parts.mlp(config))
    return parts.assemble(config, name, [layer] * config.layer_count)


def modernbert_decoder(config: Config, name: str) -> ModelSpec:
    """ModernBERT decoder: no norm before the first attention, windows of half of local_attention, a larger LM head.

    The head has a projection, a norm and a bias. The first of each global_attn_every_n_layers layers has no window.
    """
    period = config.integer("global_attn_every_n_layers", default=3)
    types = [parts.SLIDING if index % period else parts.FULL for index in range(config.layer_count)]
    window = (config.integer("local_attention", default=128, low=2)) // 2
    windows = parts.windows_of(config, window, types)
    mixers = parts.attention_layers(config, windows, bias=config.boolean("attention_bias", False))
    mlp = parts.mlp(config)
    layers = [Layer(mixer=mixer, ffn=mlp) for mixer in mixers]
    layers[0] = replace(layers[0], norms=1)
    hidden, norm_bias = config.integer("hidden_size"), config.boolean("norm_bias", False)
    vectors = 1 + norm_bias + config.boolean("classifier_bias", False)
    extras = [Extra(name="lm head layer", elements=hidden**2, matmul=True), Extra(name="lm head norm", vectors=vectors)]
    if config.boolean("decoder_bias", True):
        extras.append(parts.head_bias(config))
    norm = Norm(kind="layernorm", bias=norm_bias, embedding=True)
    return parts.assemble(config, name, layers, norm=norm, extras=tuple(extras), tie=True)


def cpmant(config: Config, name: str) -> ModelSpec:
    """CPM-Ant: prompts and segments beside the vocabulary, a table of position biases, a head that is never tied."""
    attention = replace(parts.attention(config), head_dim=config.integer("dim_head"))
    layer = Layer(
        mixer=replace(attention, v_head_dim=attention.head_dim), ffn=MLP(intermediate_size=config.integer("dim_ff"))
    )
    segments = config.integer("segment_types")
    prompts = config.integer("prompt_types") * config.integer("prompt_length")
    buckets = segments**2 + config.integer("position_bias_num_buckets")
    extras = (
        Extra(name="prompts and segments", vectors=prompts + segments),
        Extra(name="position biases", elements=buckets * attention.heads),
    )
    return parts.assemble(config, name, [layer] * config.layer_count, ties=False, extras=extras)


def mllama(config: Config, name: str) -> ModelSpec:
    """Llama 3.2 Vision's text decoder: cross_attention_layers attend to the image in place of the text.

    Their weights count, their keys and values do not: they are those of the image, whatever the context. Queries and
    outputs are projected for every token, keys and values for the image alone. The embedding has 8 rows more.
    """
    count = config.layer_count
    stated = config.data.get("cross_attention_layers")
    crossing = set(config.integers("cross_attention_layers") if stated is not None else range(3, 40, 5))
    attention = parts.attention(config)
    mlp = MLP(intermediate_size=config.integer("intermediate_size"))
    hidden = config.integer("hidden_size")
    heads, groups, dim = attention.heads, attention.kv_heads, attention.head_dim
    image = Layer(
        ffn=mlp,
        extras=(
            Extra(name="cross-attention", elements=2 * hidden * heads * dim, matmul=True),
            Extra(name="cross-attention to images", elements=2 * hidden * groups * dim + 2 * dim + 2),
        ),
    )
    text = Layer(mixer=attention, ffn=mlp)
    if crossing & set(range(count)):
        config.note("mllama: layers of cross-attention count their weights; keys and values of images are not counted")
    layers = [image if index in crossing else text for index in range(count)]
    return parts.assemble(config, name, layers, extras=(Extra(name="image tokens", vectors=8),))


def phi4_multimodal(config: Config, name: str) -> ModelSpec:
    """Phi-4-multimodal: the text decoder, which is Phi-3's."""
    config.note(f"{config.family}: the text decoder alone is counted; towers, projectors and adapters are not")
    return phi3(config, name)


MODERNBERT = keys(
    """
    causal_mask classifier_pooling deterministic_flash_attn is_causal position_embedding_type repad_logits_with_grad
    sliding_window sparse_pred_ignore_index sparse_prediction
    """
)
TOWERS = frozenset(
    ["audio_config", "audio_processor", "embd_layer", "img_processor", "speech_lora", "vision_config", "vision_lora"]
)

FAMILIES: dict[str, Family] = {
    "apertus": Family(apertus, defaults={"hidden_act": "xielu"}),
    "apertus1p5_text": Family(apertus1p5, defaults={"hidden_act": "xielu"}),
    "bitnet": Family(bitnet),
    "cpmant": Family(cpmant, inert=frozenset({"position_bias_max_distance"})),
    "diffllama": Family(diffllama),
    "doge": Family(doge, inert=frozenset({"keep_window_size", "num_experts", "num_experts_per_tok"})),
    "minicpm3": Family(latent, inert=MLA_KEYS),
    "mllama_text_model": Family(mllama),
    "modernbert-decoder": Family(modernbert_decoder, inert=MODERNBERT),
    "phi4_multimodal": Family(phi4_multimodal, inert=TOWERS | PHI),
    "phi4mm": Family(phi4_multimodal, like="phi3", inert=TOWERS | PHI),
    "youtu": Family(latent, inert=MLA_KEYS),
}
"""Reader by model_type."""
