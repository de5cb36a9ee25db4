"""A cache for transformers that keeps a power state of constant size for each layer, and no keys or values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from powerplan.errors import InputError
from powerplan.kernels import PowerState


class PowerLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """State of one power attention layer: what it keeps of the `tokens` of each of B sequences."""

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: PowerState | None = None
        self.tokens = 0

    def keep(self, state: PowerState, tokens: int) -> None:
        """Remember `state`, which is that after `tokens` more tokens."""
        self.state = state
        self.tokens += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first tokens make the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise InputError(
            "PowerCache keeps no keys and values: call use_power_attention(model) before PowerCache(model)"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.tokens, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise InputError("a power state cannot forget its last tokens: no assisted or speculative decoding")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, [N] positions or a bool for each."""
        self._change(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            kv, key = self.state
            self.state = PowerState(change(kv), None if key is None else change(key))


class PowerCache(Cache):
    """Memory of a model of `use_power_attention`: `model.generate(..., past_key_values=PowerCache(model))`.

    Power layers keep a state of constant size, whatever the context; other layers what DynamicCache keeps. Beams are
    reordered; what takes tokens back (assisted decoding) is refused. Raises InputError where the model has no layer of
    power attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = list(DynamicCache(config=model.config).layers)
        chosen = power_layers(model)
        if not chosen:
            raise InputError(f"{type(model).__name__} has no power attention: call use_power_attention(model) first")
        for position in chosen:
            layers[position] = PowerLayer()
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        kept: list[Any] = []
        for layer in self.layers:
            parts: Any = layer
            own = parts.state if isinstance(layer, PowerLayer) else (parts.keys, parts.values)
            kept.extend(own or ())
        return sum(x.nbytes for x in kept if x is not None)


def power_layers(model: PreTrainedModel) -> list[int]:
    """Return the positions of the layers whose hooks say that they attend with power."""
    modules: Iterator[Any] = model.modules()
    return [module.layer_idx for module in modules if getattr(module, "power_settings", None) is not None]
