"""State space models: the scan of Mamba-2 in chunks, the selective scan of Mamba, and both token by token.

Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 6): the state S [K, V] of a head is multiplied by exp(log_g) and
takes in b x^T. The output is S^T c. The heads of a group share b and c.
Mamba (Gu and Dao 2023, arXiv 2312.00752, algorithm 2): every channel has a state [N] and a step size of its own.

Shapes: B batch, T tokens, G groups, H heads, R = H / G heads of a group, K state dim, V channels of a head, I channels,
N state dim of a channel, C tokens of a chunk. Everything is computed in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from powerplan.models.mixers.fla import fla_supports, grouped_scan_by_fla
from powerplan.models.mixers.recurrence import MIN_LOG_G, above_diagonal, full_and_rest, no_autocast

TOKENS_PER_SCAN = 256
"""Tokens whose states exist at once in the selective scan. For 8,192 channels with 16 numbers of state each, as in
Jamba, they take 128 MiB. In chunks of 16 a scan of 256 takes 32 steps."""


def grouped_scan(
    c: Tensor, b: Tensor, x: Tensor, log_g: Tensor, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute the scan of Mamba-2 in chunks (section 6: within chunks by products, between them by states).

    Where c and b are of half precision on CUDA, flash-linear-attention runs it if that is installed, and x is rounded.

    Args:
        c: [B, T, G, K].
        b: [B, T, G, K].
        x: [B, T, H, V].
        log_g: Natural logarithms of the decays [B, T, H], at most 0.
        state: State [B, G, K, R, V] after the tokens before these; None if there are none.
        chunk_size: Tokens per chunk.

    Returns:
        Outputs [B, T, H, V] in the dtype of x, and the state [B, G, K, R, V] after the last token.
    """
    if fla_supports(c, b, x.shape[-1]):
        return grouped_scan_by_fla(c, b, x, log_g.clamp(min=MIN_LOG_G[torch.float32]), state)
    dtype, out_dtype, groups = torch.promote_types(x.dtype, torch.float32), x.dtype, c.shape[2]
    length = x.shape[1]
    heads = [torch.unflatten(part, 2, (groups, -1)) for part in (x, log_g)]
    inputs = [part.transpose(1, 2).to(dtype) for part in (c, b, *heads)]
    outs = []
    with no_autocast(x):
        for start, stop, size in full_and_rest(length, min(chunk_size, length)):
            out, state = _chunks(
                *(torch.unflatten(part[:, :, start:stop], 2, (-1, size)) for part in inputs), state=state
            )
            outs.append(out.flatten(2, 3))
    assert state is not None
    return torch.cat(outs, 2).transpose(1, 2).flatten(2, 3).to(out_dtype), state


def grouped_state(b: Tensor, x: Tensor, log_g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state that tokens leave behind in the scan of Mamba-2, without queries.

    The state after tokens that follow others is their own state plus their transition times the state before.

    Args:
        b: [B, T, G, K].
        x: [B, T, H, V].
        log_g: Natural logarithms of the decays [B, T, H], at most 0.

    Returns:
        The state [B, G, K, R, V], and the transition of each head [B, H]: the product of the decays.
    """
    faded, decay = faded_to_end(x, log_g, b.shape[2])
    with no_autocast(x):
        state = b.to(faded.dtype).permute(0, 2, 3, 1) @ faded.flatten(-2)
    return torch.unflatten(state, -1, faded.shape[-2:]), decay


def faded_to_end(x: Tensor, log_g: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return x [B, T, H, V] as the decays after each token leave it, [B, G, T, R, V], and all decays' product [B, H].

    log_g: [B, T, H]. No exponential is larger than 1.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    log_g = log_g.to(dtype).clamp(min=MIN_LOG_G[dtype]).double()  # sums of a long stretch lose digits in float32
    faded = x.to(dtype) * sums_after(log_g).exp().to(dtype)[..., None]
    return torch.unflatten(faded, 2, (groups, -1)).transpose(1, 2), log_g.sum(1).exp().to(dtype)


def sums_after(x: Tensor) -> Tensor:
    """Return the sums of all tokens after each token of x [B, T, ...]."""
    return torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1).flip(1).cumsum(1).flip(1)


def _chunks(c: Tensor, b: Tensor, x: Tensor, log_g: Tensor, *, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the outputs [B, G, n, C, R, V] of n chunks, and the last state; c, b [B, G, n, C, K]."""
    cumsum = log_g.clamp(min=MIN_LOG_G[log_g.dtype]).cumsum(-2)  # [B, G, n, C, R]
    total = cumsum[..., -1:, :]
    out = (chunk_products(c, b, cumsum) @ x.transpose(-3, -2)).transpose(-3, -2)
    to_end = x * (total - cumsum).exp()[..., None]
    updates = torch.unflatten(b.mT @ to_end.flatten(-2), -1, x.shape[-2:])
    states = []
    chunk_decay = total.exp()[..., None]  # [B, G, n, 1, R, 1]
    for index in range(c.shape[2]):
        if state is not None:
            states.append(state)
        update = updates[:, :, index]
        state = update if state is None else chunk_decay[:, :, index] * state + update
    assert state is not None
    if states:
        first = c.shape[2] - len(states)  # 1 where no state came before the first chunk, else 0
        read = torch.unflatten(c[:, :, first:] @ torch.stack(states, 2).flatten(-2), -1, x.shape[-2:])
        read = read * cumsum[:, :, first:].exp()[..., None]
        out = torch.cat((out[:, :, :first], out[:, :, first:] + read), 2)
    return out, state


def chunk_products(c: Tensor, b: Tensor, cumsum: Tensor) -> Tensor:
    """Return the products c_i . b_j, decayed by exp(cumsum_i - cumsum_j), and 0 for j > i: [..., R, C, C].

    c, b: [..., C, K], shared by the heads of a group. cumsum: [..., C, R].
    """
    by_head = cumsum.mT
    span = by_head[..., :, None] - by_head[..., None, :]
    decay = span.masked_fill(above_diagonal(c), 0).exp()
    return ((c @ b.mT)[..., None, :, :] * decay).tril()


def grouped_step(c: Tensor, b: Tensor, x: Tensor, log_g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Process one more token of Mamba-2.

    Args:
        c: [B, G, K].
        b: [B, G, K].
        x: [B, H, V].
        log_g: Natural logarithms of the decays [B, H].
        state: State [B, G, K, R, V] after the tokens before this one.

    Returns:
        The output [B, H, V] in the dtype of x, and the state after this token.
    """
    dtype, out_dtype, groups = state.dtype, x.dtype, c.shape[1]
    c, b = c.to(dtype)[..., None, :], b.to(dtype)[..., None]
    decay = torch.unflatten(log_g.to(dtype).clamp(min=MIN_LOG_G[dtype]).exp(), 1, (groups, 1, -1, 1))
    with no_autocast(state):
        update = b @ torch.unflatten(x.to(dtype), 1, (groups, -1)).flatten(2)[..., None, :]
        state = decay * state + torch.unflatten(update, -1, state.shape[-2:])
        out = torch.unflatten((c @ state.flatten(-2)).squeeze(-2), -1, state.shape[-2:])
    return out.flatten(1, 2).to(out_dtype), state


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the selective scan: h = exp(step rate) h + step x b, and the output is h . c.

    The states of TOKENS_PER_SCAN tokens exist at once. Their chunks of sqrt(TOKENS_PER_SCAN) tokens are scanned side by
    side, each from a state of 0. Then the states between chunks follow each other, and are added to all tokens. No
    exponential is larger than 1.

    Args:
        x: [B, T, I].
        step: Step sizes [B, T, I], at least 0.
        rate: [I, N], below 0.
        b: [B, T, N].
        c: [B, T, N].
        state: State [B, I, N] after the tokens before these; None if there are none.

    Returns:
        Outputs [B, T, I] in the dtype of x, and the state [B, I, N] after the last token.
    """
    dtype, out_dtype = torch.promote_types(x.dtype, torch.float32), x.dtype
    x, step, rate, b, c = (part.to(dtype) for part in (x, step, rate, b, c))
    outs = []
    with no_autocast(x):
        for parts in zip(*(torch.split(part, TOKENS_PER_SCAN, 1) for part in (x, step, b, c)), strict=True):
            size = isqrt(parts[0].shape[1])
            for start, stop, tokens in full_and_rest(parts[0].shape[1], size):
                x_, step_, b_, c_ = (part[:, start:stop].unflatten(1, (-1, tokens)) for part in parts)
                states, state = _scan(step_[..., None] * rate, (step_ * x_)[..., None] @ b_[..., None, :], state)
                outs.append((states @ c_[..., None]).squeeze(-1).flatten(1, 2))
    assert state is not None
    return torch.cat(outs, 1).to(out_dtype), state


def selective_state(x: Tensor, step: Tensor, rate: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state that tokens leave behind in the selective scan, without outputs.

    The state after tokens that follow others is their own state plus their transition times the state before, element
    by element.

    Args:
        x: [B, T, I].
        step: Step sizes [B, T, I], at least 0.
        rate: [I, N], below 0.
        b: [B, T, N].

    Returns:
        The state and the transition, [B, I, N] each.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, step, rate, b = (part.to(dtype) for part in (x, step, rate, b))
    state, transition = x.new_zeros(x.shape[0], *rate.shape), (step.sum(1)[..., None] * rate).exp()
    for x_, step_, b_ in zip(*(torch.split(part, TOKENS_PER_SCAN, 1) for part in (x, step, b)), strict=True):
        weights = (sums_after(step_)[..., None] * rate).exp()
        update = (weights * (step_ * x_)[..., None] * b_[..., None, :]).sum(1)
        state = (step_.sum(1)[..., None] * rate).exp() * state + update
    return state, transition


def _scan(log_decay: Tensor, update: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the states [B, n, C, I, N] after each token of n chunks, and the last one."""
    decay = log_decay.exp()
    own, local = update[:, :, 0], [update[:, :, 0]]
    for index in range(1, update.shape[2]):
        own = decay[:, :, index] * own + update[:, :, index]
        local.append(own)
    from_start = log_decay.cumsum(2).exp()
    before = []
    state = torch.zeros_like(own[:, 0]) if state is None else state
    for index in range(own.shape[1]):
        before.append(state)
        state = from_start[:, index, -1] * state + own[:, index]
    return torch.stack(local, 2) + from_start * torch.stack(before, 1)[:, :, None], state


def selective_step(x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Process one more token of Mamba.

    Args:
        x: [B, I].
        step: Step sizes [B, I].
        rate: [I, N], below 0.
        b: [B, N].
        c: [B, N].
        state: State [B, I, N] after the tokens before this one.

    Returns:
        The output [B, I] in the dtype of x, and the state after this token.
    """
    dtype, out_dtype = state.dtype, x.dtype
    x, step, rate, b, c = (part.to(dtype) for part in (x, step, rate, b, c))
    with no_autocast(state):
        state = (step[..., None] * rate).exp() * state + (step * x)[..., None] @ b[:, None]
        return (state @ c[..., None]).squeeze(-1).to(out_dtype), state
