"""Give models of transformers power attention in some or all layers; save and load them with it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_causal_mask

from powerplan.errors import InputError, shown
from powerplan.kernels.checks import is_integer
from powerplan.models.mixers.base import check_kernel_settings
from powerplan.models.mixers.heads import GATE_OFFSET
from powerplan.models.transformers.attention import (
    POWER,
    UNSUPPORTED_ARGUMENTS,
    PowerInputs,
    PowerSettings,
    register_power_attention,
)
from powerplan.models.transformers.cache import PowerCacheLayer

UNSUPPORTED_LAYER_TYPES = {
    "sliding_attention": UNSUPPORTED_ARGUMENTS["sliding_window"],
    "chunked_attention": "chunked attention: leave the layer out with layers=[...]",
}
"""Layer types of transformers' configs that do not see the whole context, and the words for each in the message."""

LLAMA_ATTRIBUTES = ("layer_idx", "head_dim", "num_key_value_groups")
"""A module with all of these attributes is taken for self-attention as Llama has it."""

Model = TypeVar("Model", bound=PreTrainedModel)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of an attention module's forward, as a forward pre-hook returns them."""


def use_power_attention(
    model: Model,
    p: int = 2,
    *,
    gated: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
    layers: Sequence[int] | None = None,
) -> Model:
    """Give a text decoder of transformers power attention, in place.

    The config remembers every argument but `impl`: as power_degree, power_gated, power_chunk_size and power_layers, and
    as power_softmax the attention implementation of the layers that keep softmax attention. The function can be called
    again with other arguments. What power attention does not do (dropout, windows, sinks) is refused when the model
    runs, not here.

    Args:
        model: A model of Llama's kind: its attention modules have the attributes LLAMA_ATTRIBUTES and take their
            attention function from transformers' AttentionInterface.
        p: Degree, 1 to 4. Odd degrees are not normalised.
        gated: Adds a linear map `g_proj` to each of the layers. It makes the log gates [B, T, G] from the hidden state,
            one for each of G key/value heads. It is trained and saved with the model; `power_class` loads it.
        chunk_size: Tokens per chunk, as in `power_attention`. None chooses by head dim and degree.
        impl: Implementation, as in `power_attention`.
        layers: Positions of the layers that get power attention, from 0. None stands for all. Other layers keep their
            attention.

    Returns:
        `model` itself.

    Raises:
        InputError: A model of another kind, an unknown degree or implementation, or a layer that the model lacks.
    """
    check_kernel_settings(impl, chunk_size, p)
    if not isinstance(gated, bool):
        raise InputError(f"gated must be True or False, and is {shown(gated)}")
    modules = _attention_modules(model)
    given: Any = layers
    given = given.tolist() if hasattr(given, "tolist") else given  # an array
    chosen = list(modules if given is None else given if isinstance(given, Iterable) else ())
    positions = sorted(position for position in modules if position in chosen)
    if not positions or not all(is_integer(position) and position in modules for position in chosen):
        raise InputError(f"layers must be some of 0 to {max(modules)}, and are {shown(layers)}")
    config = model.config
    # transformers has a public method that sets the attention implementation, and none that reads it.
    softmax = config._attn_implementation
    if softmax == POWER:  # A second call: the first one saved what the other layers use.
        softmax = getattr(config, "power_softmax", "sdpa")
    register_power_attention()
    model.set_attn_implementation(POWER)
    if config._attn_implementation != POWER:
        raise InputError(f"{type(model).__name__} does not take its attention from transformers' AttentionInterface")
    config.power_degree, config.power_gated, config.power_chunk_size = p, gated, chunk_size
    config.power_layers = None if layers is None else positions
    config.power_softmax = softmax
    settings = PowerSettings(p, gated, chunk_size, impl)
    for position, module in modules.items():
        if hasattr(module, "power_hook"):
            module.power_hook.remove()
        if position in positions:
            module.config = config
            _set_power(module, settings)
        else:
            _set_softmax(module, config, softmax)
    return model


@cache
def power_class(kind: type[Model], impl: str = "auto") -> type[Model]:
    """Return a class like `kind` whose models have the power attention that their config describes.

    `power_class(LlamaForCausalLM).from_pretrained(path)` loads what `use_power_attention` and `save_pretrained` wrote,
    with the gates. A config without these fields gets degree 2 in all layers, without gates.

    Args:
        kind: A model class of transformers, such as LlamaForCausalLM.
        impl: Implementation, as in `use_power_attention`.

    Returns:
        A subclass of `kind` with the same name and module.
    """

    class Power(kind):  # type: ignore[valid-type, misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            use_power_attention(
                self,
                getattr(config, "power_degree", 2),
                gated=getattr(config, "power_gated", False),
                chunk_size=getattr(config, "power_chunk_size", None),
                layers=getattr(config, "power_layers", None),
                impl=impl,
            )

        def initialize_weights(self) -> None:
            super().initialize_weights()
            for module in self.modules():
                if isinstance(module, GateProjection):
                    module.reset_parameters()

    # transformers writes the name into config.json, and reads the source of the module.
    Power.__name__, Power.__qualname__, Power.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Power


class GateProjection(nn.Linear):
    """The linear map of the gates: exp(log_g) = sigmoid(W x + b), with a first b at which a model keeps its context."""

    def reset_parameters(self) -> None:
        """Set W to 0 and b to GATE_OFFSET, except where transformers has loaded them from a checkpoint."""
        with torch.no_grad():
            initialization.zeros_(self.weight)
            initialization.constant_(self.bias, GATE_OFFSET)


def _attention_modules(model: PreTrainedModel) -> dict[int, Any]:
    """Return the self-attention modules of a decoder by their layer."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model must be a PreTrainedModel of transformers, and is a {type(model).__name__}")
    if model.config.is_encoder_decoder or model.config.sub_configs:
        raise InputError(f"{type(model).__name__} is no plain text decoder: power attention is for those")
    modules: Iterator[Any] = model.modules()
    by_layer = {
        module.layer_idx: module for module in modules if all(hasattr(module, name) for name in LLAMA_ATTRIBUTES)
    }
    if not by_layer:
        raise InputError(
            f"{type(model).__name__} has no attention of Llama's kind: no module has {', '.join(LLAMA_ATTRIBUTES)}"
        )
    return by_layer


def _layer_type(module: Any) -> str:
    """Return which keys a layer sees, by transformers' name for it.

    `config.layer_types` decides where it exists: EXAONE 4 gives its modules a `sliding_window` even in layers that see
    the whole context. Else the window of the module decides, or that of the config where the module has none, as in
    Phi-3.5-MoE.
    """
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types:
        return str(layer_types[module.layer_idx])
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return "full_attention" if window is None else "sliding_attention"


def _set_power(module: Any, settings: PowerSettings) -> None:
    """Give one attention module power attention, and gates where the settings have them."""
    module.power_settings = settings
    module.power_hook = module.register_forward_pre_hook(_add_power_inputs, with_kwargs=True)
    if not settings.gated:
        module.g_proj = None
    elif getattr(module, "g_proj", None) is None:
        weight = next(module.parameters())
        groups = module.config.num_attention_heads // module.num_key_value_groups
        module.g_proj = GateProjection(module.config.hidden_size, groups, device=weight.device, dtype=weight.dtype)


def _set_softmax(module: Any, config: Any, implementation: str) -> None:
    """Let one attention module keep softmax attention: a config of its own names the implementation."""
    module.power_settings = module.g_proj = None
    module.config = copy.copy(config)
    module.config._attn_implementation = implementation
    module.power_hook = module.register_forward_pre_hook(_replace_mask, with_kwargs=True)


def _cache_name(arguments: Container[str]) -> str:
    """Return which of these arguments is the cache: `past_key_values`, or `cache` from transformers 5.24 on."""
    return "past_key_values" if "past_key_values" in arguments else "cache"


MASK_CACHE = _cache_name(inspect.signature(create_causal_mask).parameters)
"""The argument of transformers' mask functions that is the cache."""


def _add_power_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Add settings, gates and state to the arguments of a power layer; the state takes the place of the cache."""
    settings: PowerSettings = module.power_settings
    if (description := UNSUPPORTED_LAYER_TYPES.get(_layer_type(module))) is not None:
        raise InputError(f"power attention does not do {description}")
    cache_name = _cache_name(kwargs)
    cache_layers = getattr(kwargs.get(cache_name), "layers", ())
    cache_layer = cache_layers[module.layer_idx] if module.layer_idx < len(cache_layers) else None
    if isinstance(cache_layer, PowerCacheLayer):
        kwargs = kwargs | {cache_name: None}
    elif settings.gated and cache_layer is not None and cache_layer.get_seq_length():
        raise InputError(
            f"gated power attention does not go on from keys and values: use {cache_name}=PowerCache(model)"
        )
    else:
        cache_layer = None
    log_g = None
    if settings.gated:
        logits: Tensor = module.g_proj(args[0] if args else kwargs["hidden_states"])
        log_g = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return args, kwargs | {"power": PowerInputs(settings, log_g, cache_layer)}


def _replace_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Replace the mask of a softmax layer: `power_attention_mask` made the model's, and passes on padding alone."""
    padding = kwargs.get("attention_mask")
    memory = kwargs.get(_cache_name(kwargs))
    if isinstance(memory, Cache):
        # Mask functions look for a layer to count the tokens by, and may find one that has the new tokens already.
        own_layer = memory.layers[module.layer_idx : module.layer_idx + 1]
        memory = Cache(layers=own_layer) if own_layer else DynamicCache()
    make_mask: Any = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[_layer_type(module)]
    mask = make_mask(
        config=module.config,
        inputs_embeds=args[0] if args else kwargs["hidden_states"],
        attention_mask=None if padding is None or padding.ndim == 1 else padding,
        position_ids=kwargs.get("position_ids"),
        **{MASK_CACHE: memory},
    )
    return args, kwargs | {"attention_mask": mask}
