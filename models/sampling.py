"""Sampling from a model, token by token with a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from powerplan.errors import InputError
from powerplan.kernels.distributed.agreement import explained
from powerplan.kernels.distributed.gather import gather_tokens
from powerplan.models.cache import Cache
from powerplan.models.decoder import Decoder
from powerplan.models.mixers.base import check_plan

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


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
    cp: ContextParallel | None = None,
) -> Tensor:
    """Continue a prompt by sampling one token after another.

    With recurrent mixers a new token costs the same at any context; with attention its cost grows with the context.

    Args:
        model: The language model, on the device of `prompt`.
        prompt: Token ids [B, T], int64, T >= 1.
        tokens: Number of new tokens, at least 1.
        temperature: 0 takes the likeliest token. Above 0 a token is drawn from softmax(logits / temperature).
        top_k: Draws from this many likeliest tokens alone. None draws from all.
        generator: Source of random numbers. None stands for torch's default.
        cache: Memory of earlier tokens, which the prompt then follows. Afterwards it holds the prompt and all new
            tokens but the last. None starts from nothing.
        cp: A plan of the T tokens of the prompt over several ranks, each of which gives the whole prompt and makes the
            same call. They process it together. Then each has the whole cache, and continues alone: all get the same
            new tokens, where tokens are drawn those of the group's first rank.

    Returns:
        The new tokens [B, tokens], int64.

    Raises:
        InputError: An empty prompt, or an argument below its smallest value; with a plan, a prompt of another length,
            or what `Decoder` says.
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise InputError(f"prompt must have the dims batch, tokens with at least one token, not {list(prompt.shape)}")
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, and is {tokens}")
    if temperature < 0:
        raise InputError(f"temperature must be at least 0, and is {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, and is {top_k}")
    check_plan(cp)
    if cp is not None and prompt.shape[1] != cp.layout.tokens:
        raise InputError(f"prompt: {prompt.shape[1]:,} tokens a row, and the plan has {cp.layout.tokens:,}")
    cache = Cache() if cache is None else cache
    new_tokens: list[Tensor] = []
    inputs = prompt
    while len(new_tokens) < tokens:
        if cp is None or new_tokens:
            logits = model(inputs, cache)
        else:
            logits = gather_tokens(cp, model(cp.shard(inputs), cache, cp), cp.layout.tokens - 1)
        inputs = _sample(logits[:, -1].float(), temperature, top_k, generator)
        if cp is not None and temperature > 0:  # Ranks may have generators that differ.
            with explained(cp.rank, cp.ranks):
                dist.broadcast(inputs, dist.get_global_rank(cp.group, 0), group=cp.group)
        new_tokens.append(inputs)
    return torch.cat(new_tokens, 1)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Return one token [B, 1] for each row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
