"""Softmax attention by torch's SDPA, over the whole context or over a sliding window at linear cost."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.mixers import Attention
from powerplan.models.cache import Growing
from powerplan.models.mixers.heads import HeadedMixer
from powerplan.models.mixers.sinks import attend, rescaled


class SoftmaxAttention(HeadedMixer):
    """Causal softmax attention with grouped heads; `window` keys, the token itself included, where one is set."""

    def __init__(self, mixer: Attention, hidden: int, *, rope: bool, **settings: Any) -> None:
        super().__init__(mixer, hidden, rope=rope, **settings)
        self.window = mixer.window
        self.sinks = nn.Parameter(torch.zeros(mixer.heads, **settings)) if mixer.sinks else None

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Let sinks begin at 0, as heavy as a key that a query does not mind."""
        if self.sinks is not None:
            self.sinks.zero_()

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Any, *, keep: bool
    ) -> tuple[Tensor, Any]:
        if state is not None:
            k, v = state.k.append(k), state.v.append(v)
        elif keep:
            state = KeyValues(Growing(k), Growing(v))
        out = softmax_attention(q, k, v, self.window, self.sinks)
        if keep:
            state.k.keep(self.window)
            state.v.keep(self.window)
        return out, state


class KeyValues(NamedTuple):
    """Keys [B, S, G, K] and values [B, S, G, V] of the last S tokens: all of them, or those in the window."""

    k: Growing
    v: Growing


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Return causal softmax attention [B, T, H, V] of q [B, T, H, K], k [B, S, G, K], v [B, S, G, V], sinks [H].

    The queries are the last T of the S tokens. Where T is S, a window shorter than the sequence costs T times its
    length, not T^2: in blocks through SDPA on a CPU, through a compiled FlexAttention with a block mask on a GPU.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tokens, seen = q.shape[2], k.shape[2] - q.shape[2]
    if seen:
        first = 0 if window is None else max(0, seen + 1 - window)  # the earliest key that the first query sees
        k, v = k[:, :, first:], v[:, :, first:]
        mask = None if tokens == 1 else _later(tokens, seen - first, window, q.device)
        out = attend(q, k, v, sinks, mask=mask)
    elif q.device.type == "cuda" and (sinks is not None or (window is not None and tokens > window)):
        out = _by_flex(q, k, v, min(window or tokens, tokens), sinks)
    elif window is None or tokens <= window:
        out = attend(q, k, v, sinks, causal=True)
    else:
        out = windowed(q, k, v, window, sinks)
    return out.transpose(1, 2)


def windowed(q: Tensor, k: Tensor, v: Tensor, width: int, sinks: Tensor | None = None) -> Tensor:
    """Sliding window by SDPA: a block of `width` queries sees its own block of keys and the one before, masked.

    q [B, H, T, K], k [B, G, T, K], v [B, G, T, V], sinks [H] -> [B, H, T, V].
    """
    batch, heads, tokens, _ = q.shape
    first = attend(q[:, :, :width], k[:, :, :width], v[:, :, :width], sinks, causal=True)
    if tokens <= width:
        return first
    count = -(-tokens // width)
    pad = count * width - tokens

    def blocks(x: Tensor) -> Tensor:
        """[B, heads, T, d] -> [B, blocks, heads, width, d]."""
        return F.pad(x, (0, 0, 0, pad)).view(batch, x.shape[1], count, width, x.shape[3]).transpose(1, 2)

    def pairs(x: Tensor) -> Tensor:
        whole = blocks(x)
        return torch.cat((whole[:, :-1], whole[:, 1:]), 3).flatten(0, 1)

    mask = _band(width, q.device)
    rest = attend(blocks(q)[:, 1:].flatten(0, 1), pairs(k), pairs(v), sinks, mask=mask)
    rest = rest.view(batch, count - 1, heads, width, v.shape[3]).transpose(1, 2).reshape(batch, heads, -1, v.shape[3])
    return torch.cat((first, rest[:, :, : tokens - width]), 2)


def _later(tokens: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """Return the mask [T, seen + T] of queries that follow `seen` keys, and have keys of their own."""
    mask = torch.ones(tokens, seen + tokens, dtype=torch.bool, device=device).tril(seen)
    return mask if window is None else mask.triu(seen + 1 - window)


def _band(width: int, device: torch.device) -> Tensor:
    """Return the mask of queries in the second of two blocks over the keys of both: the last `width` keys."""
    query = torch.arange(width, device=device)[:, None] + width
    key = torch.arange(2 * width, device=device)[None]
    return (key <= query) & (key > query - width)


def _by_flex(q: Tensor, k: Tensor, v: Tensor, width: int, sinks: Tensor | None) -> Tensor:
    """Sliding window by FlexAttention, which also gives the log-sum-exp of the scores; `width` T is causal."""
    mask = _sliding_mask(q.shape[2], width, str(q.device))
    settings: dict[str, Any] = {"block_mask": mask, "enable_gqa": q.shape[1] != k.shape[1]}
    if sinks is None:
        out: Tensor = _flex()(q, k, v, **settings)
        return out
    out, lse = _flex()(q, k, v, **_wanted_lse(), **settings)
    return rescaled(out, getattr(lse, "lse", lse), sinks)


def _wanted_lse() -> dict[str, Any]:
    """Return how FlexAttention is asked for the log-sum-exp: `return_lse` until torch 2.8, `return_aux` since."""
    from torch.nn.attention import flex_attention

    request = getattr(flex_attention, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def _sliding_mask(tokens: int, width: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sliding(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < width)

    # _compile: made block by block, where the eager form holds all T^2 entries.
    return create_block_mask(sliding, None, None, tokens, tokens, device=device, _compile=tokens > 8192)
