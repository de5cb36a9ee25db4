"""What transformers' models keep of a sequence, layer by layer, after a prompt and one more token."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

from hf_decoders import OWN, Settings, odd_settings

PROMPT = 12
CONTEXT = PROMPT + 1
"""Tokens that a cache has seen: a prompt, and one in a decoding step."""

WINDOW = 5
"""The window of every odd config that has one, less than half of the prompt."""

WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "local_attention",
)
"""The names that config classes have for it."""

OWN_CACHES: dict[str, Settings] = {
    "codegen": {"n_head": 8, "rotary_dim": 4},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10_000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma3n_text": {"vocab_size_per_layer_input": 97},
    "gemma4_text": {"vocab_size_per_layer_input": 97},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mamba"]},
    "phi4_multimodal": {"vision_config": {"num_hidden_layers": 1}, "audio_config": {"num_blocks": 1}},
    "xlstm": {"hidden_size": 128},  # where no dimension is rounded up: the cache rounds, and the layers do not
}
"""What the config of a family sets besides, so that its code runs."""

WITHOUT_WINDOW = {
    "minimax": "the window of softmax layers is refused by name: no published MiniMax has one",
    "nemotron_h": "sliding_window is refused by name: transformers' code does not read it",
}
"""Families whose sliding_window stays null."""

APART = {
    "dory": "its further runs keep their caches behind those of all layers: test_looped.py",
    "cpmant": "a step with a cache fails, as its code puts the learned prompt before each input, which sees both ways",
    "deepseek_v4": "keys that are the values too are kept twice: test_transformers_sparse_caches.py",
}
"""Families that are not compared here."""

UNCACHED = {"openai-gpt": "its code keeps nothing between steps"}
"""Families of which only the windows are compared."""

KEEPS_ALL = {"gpt_neo": "its code keeps every key, those before a window too"}
"""Families whose layers with a window have a cache that forgets nothing."""


@dataclass(frozen=True)
class Kept:
    """What one layer keeps of a sequence, in elements.

    cached: keys, values, latents and indexer keys. window: that of a layer whose cache forgets, in tokens.
    recurrent: recurrent states. recent: inputs of convolutions and token shifts, without the oldest one, which
    transformers keeps as well and no step reads.
    """

    cached: int = 0
    window: int | None = None
    recurrent: int = 0
    recent: int = 0


def cache_settings(config_class: Any, model_type: str) -> Settings:
    """Return the odd config of a family with windows that are in force, and layers enough to see their pattern."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    own = OWN.get(model_type, {})
    windows = () if model_type in WITHOUT_WINDOW else WINDOWS
    settings = {name: WINDOW for name in windows if name in fields}
    settings |= {
        "use_sliding_window": True,
        "max_window_layers": 2,
        config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers"): 7,
    }
    if "kv_lora_rank" in fields:
        settings["num_key_value_heads"] = 6  # latent attention repeats no heads
    return (
        odd_settings(config_class, model_type, flip=False)
        | {name: value for name, value in settings.items() if name in fields and name not in own}
        | OWN_CACHES.get(model_type, {})
    )


def run(transformers: Any, torch: Any, model: Any) -> tuple[list[Kept], list[Any]]:
    """Return what each layer keeps after CONTEXT tokens, and the attention weights of the prompt where there are any.

    Weights are those of a whole prompt alone, of shape (heads, PROMPT, PROMPT).
    """
    prompt, following = torch.arange(PROMPT)[None] + 3, torch.tensor([[5]])
    in_modules = model.config.model_type == "recurrent_gemma"
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    given = {name: transformers.DynamicCache(config=model.config)} if in_modules else {}
    with torch.no_grad():
        first = model(prompt, use_cache=True, output_attentions=True, **given)
        names = ("cache", "past_key_values", "cache_params", "state")
        # From 5.24 on the first of them is the only one; the others are its old names.
        given = given or dict([(name, first[name]) for name in names if first.get(name) is not None][:1])
        if model.config.model_type not in UNCACHED:
            model(following, use_cache=True, **given)
    cache: Any = next(iter(given.values()), [])
    weights = [entry[0] for entry in first.get("attentions") or () if entry is not None and entry.dim() == 4]
    weights = [entry for entry in weights if entry.shape[1:] == (PROMPT, PROMPT)]
    if in_modules:
        return _in_modules(model, cache), weights
    if not cache:
        return [], weights
    if isinstance(cache, list):
        return _by_quantity(cache), weights
    if hasattr(cache, "rnn_state"):
        return [Kept(recurrent=_elements(cache.rnn_state[layer])) for layer in sorted(cache.rnn_state)], weights
    linear = getattr(cache, "linear_cache", [])
    kept = [_of_layer(layer) for layer in cache.layers]
    for index, state in enumerate(linear):
        if len(state):
            kept[index] = Kept(recurrent=state.numel())
    return kept, weights


def _elements(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def _of_layer(layer: Any) -> Kept:
    """Return what a layer of transformers' DynamicCache keeps."""
    names = ("keys", "values", "indexer_keys", "idx_keys")
    convolutions = [state for state in getattr(layer, "conv_states", {}).values() if state is not None]
    return Kept(
        cached=_elements(getattr(layer, name, None) for name in names),
        window=layer.sliding_window if getattr(layer, "is_sliding", False) else None,
        recurrent=_elements(getattr(layer, "recurrent_states", {}).values()),
        recent=sum(state[..., 1:].numel() for state in convolutions),
    )


def _in_modules(model: Any, cache: Any) -> list[Kept]:
    """RecurrentGemma: recurrent layers keep their states in their modules."""
    kept = []
    for block, layer in zip(model.model.layers, cache.layers, strict=True):
        mixer = block.temporal_block
        if hasattr(mixer, "rg_lru"):
            kept.append(Kept(recurrent=mixer.rg_lru.recurrent_states.numel(), recent=mixer.conv1d_state.numel()))
        else:
            kept.append(_of_layer(layer))
    return kept


def _by_quantity(state: list[Any]) -> list[Kept]:
    """RWKV-4: the last inputs of both mixes, then numerator, denominator and maximum, each (1, width, layers)."""
    recent, recurrent = state[:2], state[2:]
    layers = range(state[0].shape[-1])
    return [
        Kept(recurrent=_elements(entry[..., i] for entry in recurrent), recent=_elements(e[..., i] for e in recent))
        for i in layers
    ]
