"""Power attention as an attention implementation of transformers: `attn_implementation="power"`.

transformers calls two functions that `register_power_attention` registers: `power_attention_mask` once per forward pass
of the model, and `power_attention_forward` in every layer, with what the first one returned as `attention_mask`.

Shapes: B batch, T new tokens, S tokens in total, H query heads, G key/value heads, K key head dim, V value head dim,
N packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

# The documentation of torch has fake tensors in torch._subclasses; there is no other name for them.
from torch._subclasses import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from powerplan.errors import InputError
from powerplan.kernels import power_attention, power_attention_step
from powerplan.kernels.state import divisor
from powerplan.models.transformers.cache import PowerCacheLayer

POWER = "power"
"""The name of this attention implementation: `attn_implementation="power"`."""

MAX_DIRECT_QUERIES = 16
"""With a cache of keys and values, up to this many new queries attend to every key directly, at a cost of T S weights.
More queries go through the chunked kernels, which process all S tokens again."""

UNSUPPORTED_ARGUMENTS = {
    "sliding_window": "a sliding window: set config.sliding_window to None, or leave the layer out with layers=[...]",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "output_attentions": "output_attentions: its weights never exist as a whole",
    "read_index": "paged caches",
    "cache": "paged caches, and this version of transformers calls all others past_key_values",
}
"""Keyword arguments of transformers' attention functions that are refused, and the words for each in the message."""


def register_power_attention() -> None:
    """Make `attn_implementation="power"` known to transformers.

    A model that is built with this name has power attention in every layer, of degree `config.power_degree` (2 where
    the config has none). Gates and a cache of constant size need `use_power_attention`, which calls this function too.
    """
    AttentionInterface.register(POWER, power_attention_forward)
    AttentionMaskInterface.register(POWER, power_attention_mask)


@dataclass(frozen=True)
class PowerSettings:
    """How one layer computes power attention: the arguments of `use_power_attention`."""

    p: int = 2
    gated: bool = False
    chunk_size: int | None = None
    impl: str = "auto"

    @property
    def normalize(self) -> bool:
        """Whether weights are divided by their sum. Those of odd degrees have both signs and are not."""
        return self.p % 2 == 0


@dataclass(frozen=True)
class PowerInputs:
    """What `power_attention_forward` needs beyond the arguments that transformers passes to it.

    A hook on the attention module adds it as the keyword argument `power`. log_g: log gates [B, T, G], at most 0, or
    None without gates. cache_layer: where the state of this layer is kept, or None.
    """

    settings: PowerSettings
    log_g: Tensor | None = None
    cache_layer: PowerCacheLayer | None = None


def power_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    power: PowerInputs | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return power attention of the last T of S tokens, with the signature of transformers' attention functions.

    Args:
        module: The attention module of the layer. Its config gives the degree where `power` is None.
        query: [B, H, T, K].
        key: [B, G, S, K].
        value: [B, G, S, V].
        attention_mask: What `power_attention_mask` returned for the model: None, bool [B, S], or [N + 1].
        dropout: Must be 0.
        scaling: Factor on the products of queries and keys. None stands for K^-0.5.
        power: Settings, gates and state of this layer, if `use_power_attention` has hooked it.
        cu_seq_lens_q: Bounds [N + 1] of packed sequences in the B T tokens, integers from 0 on.
        **kwargs: Arguments of other attention functions. Those of UNSUPPORTED_ARGUMENTS are refused.

    Returns:
        Outputs [B, T, H, V] in the dtype of `value`, and None for the attention weights.

    Raises:
        InputError: Dropout, windows, sinks, soft-capping, position biases, or a mask that is not causal.
    """
    _check_supported(module, attention_mask, dropout, kwargs)
    if power is None:
        power = PowerInputs(PowerSettings(p=getattr(module.config, "power_degree", 2)))
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    q, k = q.to(v.dtype), k.to(v.dtype)  # Norms of queries and keys return float32 under autocast.
    log_g, cu_seqlens = power.log_g, cu_seq_lens_q
    if attention_mask is not None and attention_mask.ndim == 1:
        cu_seqlens = attention_mask if cu_seqlens is None else cu_seqlens
    elif attention_mask is not None:
        # A key of zeros has weight 0, and a log gate of 0 forgets nothing: the padded token changes no output.
        is_padding = ~attention_mask[:, -k.shape[1] :, None]
        k = k.masked_fill(is_padding[..., None], 0)
        log_g = None if log_g is None else log_g.masked_fill(is_padding, 0)
    step_options: dict[str, Any] = {"p": power.settings.p, "scale": scaling, "normalize": power.settings.normalize}
    options = step_options | {"chunk_size": power.settings.chunk_size, "impl": power.settings.impl}
    past_tokens = k.shape[1] - q.shape[1]
    if cu_seqlens is not None:
        if power.cache_layer is not None or past_tokens:
            raise InputError("packed sequences do not go on from a cache: pass use_cache=False")
        return _attend_packed(q, k, v, log_g, cu_seqlens, options), None
    if power.cache_layer is not None:
        return _attend_from_state(power.cache_layer, q, k, v, log_g, step_options, options), None
    if past_tokens and q.shape[1] <= MAX_DIRECT_QUERIES:
        return _attend_to_all_keys(q, k, v, **step_options), None
    all_queries = F.pad(q, (0, 0, 0, 0, past_tokens, 0))  # The kernels take as many queries as keys.
    out: Tensor = power_attention(all_queries, k, v, log_g, **options)
    return out[:, past_tokens:], None


def power_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return what `power_attention_forward` must know of a model's mask, with the signature of transformers' masks.

    No tensor of T x S entries is made.

    Args:
        batch_size: B.
        q_length: T, the new tokens.
        kv_length: Not used: the number of keys is `q_offset` + `q_length`.
        q_offset: Tokens in the cache.
        kv_offset: Not used.
        mask_function: transformers' rule for which key a query sees. Any but the causal one is taken as packing.
        attention_mask: bool [B, S], False at padding, or None.
        **kwargs: Further arguments of transformers' mask functions: config, device, local_size, use_vmap.

    Returns:
        None for a causal mask without padding; `attention_mask` where there is padding; or the bounds [N + 1] of packed
        sequences in the B T tokens, int64.

    Raises:
        InputError: The mask is not causal or has overlays, the layer has a window, or the cache is a static one.
    """
    config = kwargs.get("config")
    if kwargs.get("local_size") is not None:
        if getattr(config, "power_layers", None) is None:
            raise InputError(f"power attention does not do {UNSUPPORTED_ARGUMENTS['sliding_window']}")
        return attention_mask  # For layers without power attention: their hooks make a mask of it.
    if isinstance(q_offset, Tensor):
        raise InputError("power attention does not go on from a static cache: use PowerCache or DynamicCache")
    if attention_mask is not None:
        tokens = q_offset + q_length
        if attention_mask.shape[1] != tokens:
            raise InputError(
                f"attention_mask covers {attention_mask.shape[1]:,} tokens of {tokens:,}, the cached among them"
            )
        if not _is_traced(attention_mask) and bool(attention_mask.all()):
            attention_mask = None
    # The values of a traced tensor are not known: packed sequences need cu_seq_lens_q there.
    if mask_function is causal_mask_function or _is_traced(attention_mask):
        return attention_mask
    if attention_mask is not None or kwargs.get("use_vmap"):
        raise InputError("power attention does not do masks with overlays: only causal ones, padding and packing")
    return _packed_bounds(batch_size, q_length, mask_function, kwargs["device"])


def _packed_bounds(rows: int, tokens: int, mask_function: Callable[..., Any], device: torch.device) -> Tensor:
    """Return the bounds [N + 1] of packed sequences: a new one starts where a token does not see the one before."""
    row = torch.arange(rows, device=device)[:, None]
    token, head = torch.arange(tokens - 1, device=device)[None], torch.zeros((), dtype=torch.long, device=device)
    if bool(mask_function(row, head, token, token + 1).any()):
        raise InputError("power attention is causal: this mask lets tokens see later ones")
    is_start = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    is_start[:, 1:] = ~mask_function(row, head, token + 1, token)
    return torch.cat((is_start.flatten().nonzero()[:, 0], torch.tensor([rows * tokens], device=device)))


def _is_traced(x: Tensor | None) -> bool:
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def _check_supported(module: nn.Module, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    for name, description in UNSUPPORTED_ARGUMENTS.items():
        if (value := kwargs.get(name)) is not None and value is not False:
            raise InputError(f"power attention does not do {description}")
    if dropout:
        raise InputError(f"power attention does not do dropout: config.attention_dropout is {dropout}, and must be 0")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise InputError("power attention is causal, and this layer is not")
    if attention_mask is not None and attention_mask.ndim > 2:
        raise InputError(f"attention_mask must be [batch, tokens], and has shape {list(attention_mask.shape)}")


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor, options: dict[str, Any]
) -> Tensor:
    rows, tokens = q.shape[:2]
    q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    log_g = None if log_g is None else log_g.flatten(0, 1)[None]
    out: Tensor = power_attention(q, k, v, log_g, cu_seqlens=cu_seqlens, **options)
    return out.view(rows, tokens, *out.shape[2:])


def _attend_from_state(
    cache_layer: PowerCacheLayer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    step_options: dict[str, Any],
    options: dict[str, Any],
) -> Tensor:
    """Return attention of the T tokens that follow those in `cache_layer`, and add them to its state."""
    tokens = q.shape[1]
    if tokens == 1 and cache_layer.state is not None:
        step_log_g = None if log_g is None else log_g[:, 0]
        out, state = power_attention_step(q[:, 0], k[:, 0], v[:, 0], step_log_g, cache_layer.state, **step_options)
        out = out[:, None]
    else:
        out, state = power_attention(q, k, v, log_g, initial_state=cache_layer.state, return_state=True, **options)
    cache_layer.set_state(state, tokens)
    return out


def _attend_to_all_keys(q: Tensor, k: Tensor, v: Tensor, *, p: int, scale: float | None, normalize: bool) -> Tensor:
    """Return attention without gates [B, T, H, V] of the last T of S tokens, from its definition with T S weights."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    tokens, total, groups = q.shape[1], k.shape[1], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # R query heads share a key head: [B, T, G, R, K] and [B, S, G, K] -> [B, G, R, T, S]
    queries = (scale * q.to(dtype)).view(*q.shape[:2], groups, -1, q.shape[-1])
    weights = torch.einsum("btgrk,bsgk->bgrts", queries, k.to(dtype)) ** p
    weights = weights * weights.new_ones(tokens, total).tril(total - tokens)
    if normalize:
        weights = weights / divisor(weights.sum(-1, keepdim=True))
    out = torch.einsum("bgrts,bsgv->btgrv", weights, v.to(dtype))
    return out.flatten(2, 3).to(v.dtype)
