"""Power attention as an attention implementation of transformers: `attn_implementation="power"`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from powerplan.errors import InputError
from powerplan.kernels import power_attention, power_attention_step
from powerplan.kernels.state import divisor
from powerplan.models.hf_cache import PowerLayer

NAME = "power"
FEW_QUERIES = 16
"""Up to so many queries after keys of a growing cache meet all keys directly; more go through the chunked kernels."""

UNSUPPORTED = {
    "sliding_window": "a sliding window: set config.sliding_window to None, or leave the layer out with layers=[...]",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "output_attentions": "output_attentions: its weights never exist as a whole",
    "cache": "a paged cache",
}
"""Keyword arguments of transformers' attention functions, and what each asks for."""


def register_power_attention() -> None:
    """Make `attn_implementation="power"` known to transformers.

    A model that is given it attends with degree `config.power_degree` (2 where it has none) in every layer. Gates and
    the cache of constant size need `use_power_attention`, which registers too.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


@dataclass(frozen=True)
class PowerSettings:
    """How a layer attends; odd degrees are not normalised."""

    p: int = 2
    gated: bool = False
    chunk_size: int | None = None
    impl: str = "auto"

    @property
    def normalize(self) -> bool:
        return self.p % 2 == 0


@dataclass(frozen=True)
class PowerCall:
    """What a layer's hook knows and transformers does not pass on: settings, gates [B, T, G], the state to go on from.

    It travels as the keyword argument `power` through the layer's forward to `attend`.
    """

    settings: PowerSettings
    log_g: Tensor | None = None
    memory: PowerLayer | None = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    power: PowerCall | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return power attention [B, T, H, V] of query [B, H, T, K] to key [B, G, S, K] and value [B, G, S, V].

    The queries are the last T of the S tokens. attention_mask: what `mask` made of the model's, or None. cu_seq_lens_q:
    [N + 1] bounds of packed sequences. Raises InputError for what power attention does not do: dropout, windows, sinks,
    soft-capping, position biases, masks that are not causal.
    """
    _refuse(module, attention_mask, dropout, kwargs)
    if power is None:
        power = PowerCall(PowerSettings(p=getattr(module.config, "power_degree", 2)))
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    q, k = q.to(v.dtype), k.to(v.dtype)  # Norms of queries and keys return float32 under autocast.
    log_g, bounds = power.log_g, cu_seq_lens_q
    if attention_mask is not None and attention_mask.ndim == 1:
        bounds = attention_mask if bounds is None else bounds
    elif attention_mask is not None:
        # A key of zeros has the weight 0, and a gate of 1 forgets nothing: as if the token were not there.
        hidden = ~attention_mask[:, -k.shape[1] :, None]
        k = k.masked_fill(hidden[..., None], 0)
        log_g = None if log_g is None else log_g.masked_fill(hidden, 0)
    settings: dict[str, Any] = {"p": power.settings.p, "scale": scaling, "normalize": power.settings.normalize}
    whole = settings | {"chunk_size": power.settings.chunk_size, "impl": power.settings.impl}
    before = k.shape[1] - q.shape[1]
    if bounds is not None:
        if power.memory is not None or before:
            raise InputError("packed sequences do not go on from a cache: pass use_cache=False")
        return _packed(q, k, v, log_g, bounds, whole), None
    if power.memory is not None:
        return _go_on(power.memory, q, k, v, log_g, settings, whole), None
    if before and q.shape[1] <= FEW_QUERIES:
        return _directly(q, k, v, **settings), None
    out: Tensor = power_attention(F.pad(q, (0, 0, 0, 0, before, 0)), k, v, log_g, **whole)  # type: ignore[assignment]
    return out[:, before:], None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return what `attend` needs to know of a model's mask; nothing of the size of T^2.

    None for a causal mask and nothing else; bool [B, S], False at padding; or the bounds [N + 1] of packed sequences in
    the B rows laid end to end. Raises InputError for masks that are not causal, windows, and static caches.
    """
    config = kwargs.get("config")
    if kwargs.get("local_size") is not None:
        if getattr(config, "power_layers", None) is None:
            raise InputError(f"power attention does not do {UNSUPPORTED['sliding_window']}")
        return attention_mask  # Of other layers, whose hooks make their own masks of it.
    if isinstance(q_offset, Tensor):
        raise InputError("power attention does not go on from a static cache: use PowerCache or DynamicCache")
    if attention_mask is not None:
        tokens = q_offset + q_length
        if attention_mask.shape[1] != tokens:
            raise InputError(
                f"attention_mask covers {attention_mask.shape[1]:,} tokens of {tokens:,}, the cached among them"
            )
        if not _traced(attention_mask) and bool(attention_mask.all()):
            attention_mask = None
    # What is in a traced tensor is not known: packed sequences need cu_seq_lens_q there.
    if mask_function is causal_mask_function or _traced(attention_mask):
        return attention_mask
    if attention_mask is not None or kwargs.get("use_vmap"):
        raise InputError("power attention does not do masks with overlays: only causal ones, padding and packing")
    return _bounds(batch_size, q_length, mask_function, kwargs["device"])


def _bounds(rows: int, tokens: int, mask_function: Callable[..., Any], device: torch.device) -> Tensor:
    """Return the bounds of packed sequences: a sequence ends where the next token does not see this one."""
    row = torch.arange(rows, device=device)[:, None]
    this, head = torch.arange(tokens - 1, device=device)[None], torch.zeros((), dtype=torch.long, device=device)
    if bool(mask_function(row, head, this, this + 1).any()):
        raise InputError("power attention is causal: this mask lets tokens see later ones")
    starts = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    starts[:, 1:] = ~mask_function(row, head, this + 1, this)
    return torch.cat((starts.flatten().nonzero()[:, 0], torch.tensor([rows * tokens], device=device)))


def _traced(x: Tensor | None) -> bool:
    return torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor)


def _refuse(module: nn.Module, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    for name, words in UNSUPPORTED.items():
        if (value := kwargs.get(name)) is not None and value is not False:
            raise InputError(f"power attention does not do {words}")
    if dropout:
        raise InputError(f"power attention does not do dropout: config.attention_dropout is {dropout}, and must be 0")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise InputError("power attention is causal, and this layer is not")
    if attention_mask is not None and attention_mask.ndim > 2:
        raise InputError(f"attention_mask must be [batch, tokens], and has shape {list(attention_mask.shape)}")


def _packed(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, bounds: Tensor, settings: dict[str, Any]) -> Tensor:
    rows, tokens = q.shape[:2]
    joined = (None if x is None else x.flatten(0, 1)[None] for x in (q, k, v, log_g))
    out: Tensor = power_attention(*joined, cu_seqlens=bounds, **settings)  # type: ignore[arg-type, assignment]
    return out.view(rows, tokens, *out.shape[2:])


def _go_on(
    memory: PowerLayer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    settings: dict[str, Any],
    whole: dict[str, Any],
) -> Tensor:
    """Return attention of tokens that follow those in `memory`, and take them into it."""
    tokens = q.shape[1]
    if tokens == 1 and memory.state is not None:
        last = None if log_g is None else log_g[:, 0]
        out, state = power_attention_step(q[:, 0], k[:, 0], v[:, 0], last, memory.state, **settings)
        out = out[:, None]
    else:
        out, state = power_attention(q, k, v, log_g, initial_state=memory.state, return_state=True, **whole)
    memory.keep(state, tokens)
    return out


def _directly(q: Tensor, k: Tensor, v: Tensor, *, p: int, scale: float | None, normalize: bool) -> Tensor:
    """Return ungated attention [B, T, H, V] by definition, of the last T of S tokens: cost grows with S."""
    exact = torch.promote_types(q.dtype, torch.float32)
    tokens, seen, groups = q.shape[1], k.shape[1], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # [B, T, G, R, K] and [B, S, G, K] -> [B, G, R, T, S]
    queries = (scale * q.to(exact)).view(*q.shape[:2], groups, -1, q.shape[-1])
    weights = torch.einsum("btgrk,bsgk->bgrts", queries, k.to(exact)) ** p
    weights = weights * weights.new_ones(tokens, seen).tril(seen - tokens)
    if normalize:
        weights = weights / divisor(weights.sum(-1, keepdim=True))
    out = torch.einsum("bgrts,bsgv->btgrv", weights, v.to(exact))
    return out.flatten(2, 3).to(v.dtype)
