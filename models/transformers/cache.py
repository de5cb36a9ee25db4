"""A cache for transformers that keeps a power state of constant size for each layer, and no keys or values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from powerplan.errors import InputError
from powerplan.kernels import PowerState


class PowerCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The state of one power attention layer after the `tokens` tokens of each of B sequences.

    transformers calls the methods that it defines on every cache layer. The attention function of a power layer calls
    `set_state` instead of transformers' `update`, because there are no keys and values to append.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: PowerState | None = None
        self.tokens = 0

    def set_state(self, state: PowerState, new_tokens: int) -> None:
        """Replace the state by `state`, which has taken in `new_tokens` tokens more."""
        self.state = state
        self.tokens += new_tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first call of `set_state` brings the first state."""

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

    def get_max_cache_shape(self) -> int:  # The name of get_max_length in older versions of transformers.
        return -1

    def reset(self) -> None:
        self.state, self.tokens, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise InputError("a power state cannot forget its last tokens: no assisted or speculative decoding")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select sequences: `indices` holds their positions [N] in the batch, or one bool [B] for each sequence."""
        self._map_state(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_state(lambda x: x.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        self._map_state(lambda x: x.to("cpu", non_blocking=True))

    def _map_state(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            kv, key = self.state
            self.state = PowerState(function(kv), None if key is None else function(key))


class PowerCache(Cache):
    """The cache of a model with power attention: `model.generate(..., cache=PowerCache(model))`.

    Before transformers 5.24 the argument is called `past_key_values`.

    Layers with power attention keep a state whose size does not depend on the context. All other layers keep what
    transformers' DynamicCache keeps for them. Beam search works. Methods that take tokens back (assisted and
    speculative decoding) are refused when they are called.

    Args:
        model: A model that `use_power_attention` has changed, or one of a class that `power_class` made.

    Raises:
        InputError: No layer of the model has power attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = list(DynamicCache(config=model.config).layers)
        positions = power_layer_positions(model)
        if not positions:
            raise InputError(f"{type(model).__name__} has no power attention: call use_power_attention(model) first")
        for position in positions:
            layers[position] = PowerCacheLayer()
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all states, keys and values in this cache."""
        tensors: list[Any] = []
        for layer in self.layers:
            if isinstance(layer, PowerCacheLayer):
                tensors.extend(layer.state or ())
            else:
                untyped: Any = layer  # transformers' base class does not declare keys and values.
                tensors.extend((untyped.keys, untyped.values))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def power_layer_positions(model: PreTrainedModel) -> list[int]:
    """Return the positions of the layers that `use_power_attention` has given power attention."""
    modules: Iterator[Any] = model.modules()
    return [module.layer_idx for module in modules if getattr(module, "power_settings", None) is not None]
