"""Models of transformers with power attention in some or all layers, gated or not, saved and loaded as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from powerplan.errors import InputError
from powerplan.kernels.api import DEGREES, IMPLEMENTATIONS
from powerplan.models.hf_attention import NAME, UNSUPPORTED, PowerCall, PowerSettings, register_power_attention
from powerplan.models.hf_cache import PowerLayer
from powerplan.models.mixers.heads import OPEN

NARROWER = {
    "sliding_attention": UNSUPPORTED["sliding_window"],
    "chunked_attention": "chunked attention: leave the layer out with layers=[...]",
}
"""Patterns of layers that do not see the whole context, as transformers calls them, and what they ask for."""

Model = TypeVar("Model", bound=PreTrainedModel)


def use_power_attention(
    model: Model,
    p: int = 2,
    *,
    gated: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
    layers: Sequence[int] | None = None,
) -> Model:
    """Give `model`, a text decoder of transformers of Llama's kind, power attention in place, and return it.

    p, chunk_size, impl: as in `power_attention`; odd degrees are not normalised. gated: each of those layers gets a
    `g_proj` that makes log_g [B, T, G] of its hidden state, G the key/value heads; it is trained and saved with the
    model, and `power_class` loads it. layers: positions of the layers that get power attention, all where None; the
    others attend as before. `config` remembers it all but `impl`, as power_degree, power_gated, power_chunk_size and
    power_layers.

    Raises InputError for a model of another kind, and for degrees and layers that there are not. What power attention
    does not do (dropout, windows, sinks) is refused when the model runs.
    """
    if p not in DEGREES or isinstance(p, bool):
        raise InputError(f"p must be 1, 2, 3 or 4, and is {p!r}")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise InputError(f"impl must be auto, {', '.join(IMPLEMENTATIONS)}, and is {impl!r}")
    modules = _attention_modules(model)
    chosen = list(modules) if layers is None else sorted(set(layers))
    unknown = [position for position in chosen if position not in modules]
    if unknown or not chosen:
        raise InputError(f"layers must be some of 0 to {max(modules)}, and are {list(layers or ())}")
    config = model.config
    softmax = config._attn_implementation
    if softmax == NAME:  # Called before: what the others have is what those left out have.
        softmax = getattr(config, "power_softmax", "sdpa")
    register_power_attention()
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise InputError(f"{type(model).__name__} does not take its attention from transformers' AttentionInterface")
    config.power_degree, config.power_gated, config.power_chunk_size = p, gated, chunk_size
    config.power_layers = None if layers is None else chosen
    config.power_softmax = softmax
    settings = PowerSettings(p, gated, chunk_size, impl)
    for position, module in modules.items():
        _release(module)
        if position in chosen:
            module.config = config
            _take(module, settings)
        else:
            module.g_proj = None
            module.config = copy.copy(config)
            module.config._attn_implementation = softmax
            module.power_hook = module.register_forward_pre_hook(_with_own_mask, with_kwargs=True)
    return model


@cache
def power_class(kind: type[Model], impl: str = "auto") -> type[Model]:
    """Return a class like `kind` (LlamaForCausalLM, say) whose models have the power attention that their config names.

    `power_class(LlamaForCausalLM).from_pretrained(path)` loads what `use_power_attention` and `save_pretrained` left
    there, gates included. A config that names none gets p = 2. impl: as in `use_power_attention`.
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
                    module.initialize()

    # Transformers writes the name into config.json, and looks at the source of the module.
    Power.__name__, Power.__qualname__, Power.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Power


class GateProjection(nn.Linear):
    """The linear map of a gate, exp(log_g) = sigmoid(W x + b); b begins so that a model keeps its context."""

    def reset_parameters(self) -> None:
        self.initialize()

    def initialize(self) -> None:
        """Set what transformers has not loaded from a checkpoint."""
        with torch.no_grad():
            initialization.zeros_(self.weight)
            initialization.constant_(self.bias, OPEN)


def _attention_modules(model: PreTrainedModel) -> dict[int, Any]:
    """Return the self-attention modules of a decoder by their layer."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model must be a PreTrainedModel of transformers, and is a {type(model).__name__}")
    if model.config.is_encoder_decoder or model.config.sub_configs:
        raise InputError(f"{type(model).__name__} is no plain text decoder: power attention is for those")
    marks = ("layer_idx", "head_dim", "num_key_value_groups")
    modules: Iterator[Any] = model.modules()
    found = {module.layer_idx: module for module in modules if all(hasattr(module, mark) for mark in marks)}
    if not found:
        raise InputError(f"{type(model).__name__} has no attention of Llama's kind: no module has {', '.join(marks)}")
    return found


def _pattern(module: Any) -> str:
    """Return which keys a layer sees, by the name that transformers has for it.

    A layer's own `sliding_window` is the last word only where its config lists no patterns: some families set it on
    layers that see the whole context (EXAONE 4), some on none (Phi-3.5-MoE).
    """
    patterns = getattr(module.config, "layer_types", None)
    if patterns:
        return str(patterns[module.layer_idx])
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return "full_attention" if window is None else "sliding_attention"


def _release(module: Any) -> None:
    """Undo what an earlier call did to a layer."""
    if hasattr(module, "power_hook"):
        module.power_hook.remove()
    module.power_settings = None


def _take(module: Any, settings: PowerSettings) -> None:
    """Let a layer attend with power."""
    module.power_settings = settings
    module.power_hook = module.register_forward_pre_hook(_with_power, with_kwargs=True)
    if not settings.gated:
        module.g_proj = None
    elif getattr(module, "g_proj", None) is None:
        weight = next(module.parameters())
        groups = module.config.num_attention_heads // module.num_key_value_groups
        module.g_proj = GateProjection(module.config.hidden_size, groups, device=weight.device, dtype=weight.dtype)


def _with_power(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add what `attend` needs to the arguments of a layer: settings, gates, and its state in the place of a cache."""
    settings: PowerSettings = module.power_settings
    if (words := NARROWER.get(_pattern(module))) is not None:
        raise InputError(f"power attention does not do {words}")
    cache, position = kwargs.get("past_key_values"), module.layer_idx
    kept = None if cache is None or position >= len(cache.layers) else cache.layers[position]
    memory = kept if isinstance(kept, PowerLayer) else None
    if memory is not None:
        kwargs = kwargs | {"past_key_values": None}
    elif settings.gated and kept is not None and kept.get_seq_length():
        raise InputError(
            "gated power attention does not go on from keys and values: use past_key_values=PowerCache(model)"
        )
    log_g = None
    if settings.gated:
        logits: Tensor = module.g_proj(args[0] if args else kwargs["hidden_states"])
        log_g = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return args, kwargs | {"power": PowerCall(settings, log_g, memory)}


def _with_own_mask(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the mask of a layer that keeps its attention, from the padding that the model passes to power layers."""
    padding = kwargs.get("attention_mask")
    make: Any = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[_pattern(module)]
    own = make(
        config=module.config,
        inputs_embeds=args[0] if args else kwargs["hidden_states"],
        attention_mask=None if padding is None or padding.ndim == 1 else padding,
        past_key_values=kwargs.get("past_key_values"),
        position_ids=kwargs.get("position_ids"),
        layer_idx=module.layer_idx,
    )
    return args, kwargs | {"attention_mask": own}
