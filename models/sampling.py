"""Sampling from a model, token by token with a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from powerplan.errors import InputError
from powerplan.models.cache import Cache
from powerplan.models.decoder import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Return `tokens` more tokens after `prompt` [B, T], T >= 1, as [B, tokens].

    temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn, from the `top_k`
    likeliest where that is set. A token costs the same at any context for recurrent mixers. cache: goes on from what it
    remembers, and remembers prompt and answer but for the last token. Raises InputError for sizes below these.
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise InputError(f"prompt must have the dims batch, tokens with at least one token, not {list(prompt.shape)}")
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, and is {tokens}")
    if temperature < 0:
        raise InputError(f"temperature must be at least 0, and is {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, and is {top_k}")
    cache = Cache() if cache is None else cache
    found: list[Tensor] = []
    fed = prompt
    while len(found) < tokens:
        logits = model(fed, cache)[:, -1].float()
        fed = _choose(logits, temperature, top_k, generator)
        found.append(fed)
    return torch.cat(found, 1)


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Return one token [B, 1] by logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
