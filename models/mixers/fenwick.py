"""Log-linear attention over Mamba-2 (Guo et al. 2025, arXiv 2506.04761, section 3): states of a Fenwick tree.

The tokens before token i are in one bucket for each 1 bit of i: for bit h the 2^h tokens before i with its bits up to h
set to 0. Every bucket has a state of its own, and token i weights what it reads of them: weight h + 1 for bit h, and
weight 0 for itself. So token j reaches token i through weight (i xor j).bit_length(). Buckets merge as a binary counter
carries.

Shapes: B batch, T tokens, G groups, H heads, R = H / G heads of a group, K state dim, V channels of a head, L levels, n
chunks of C tokens. Everything is computed in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerplan.models.mixers.recurrence import MIN_LOG_G, no_autocast
from powerplan.models.mixers.scans import chunk_products, faded_to_end

States = dict[int, Tensor]
"""States [B, G, K, R, V] of the buckets, by their bits."""


def log_linear_scan(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    log_g: Tensor,
    weight: Tensor,
    state: Tensor | None,
    past_tokens: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute log-linear attention in chunks: pairs of tokens within a chunk, states between chunks.

    Chunks begin at multiples of their size, counted from the first token of the sequence.

    Args:
        c: [B, T, G, K].
        b: [B, T, G, K].
        x: [B, T, H, V].
        log_g: Natural logarithms of the decays [B, T, H], at most 0.
        weight: Weights of the levels [B, T, H, L], one more than the last token's index has bits, or more.
        state: States [B, past_tokens.bit_length(), G, K, R, V] after the tokens before these; None if there are none.
        past_tokens: How many tokens came before.
        chunk_size: Tokens per chunk, a power of 2.

    Returns:
        Outputs [B, T, H, V] in the dtype of x, and the states after the last token, zeros for its 0 bits.
    """
    dtype, groups, length = torch.promote_types(x.dtype, torch.float32), c.shape[2], x.shape[1]
    heads = [torch.unflatten(part, 2, (groups, -1)) for part in (x, log_g, weight)]
    inputs = [part.transpose(1, 2).to(dtype) for part in (c, b, *heads)]
    states: States = {}
    if state is not None:
        states = {bit: state[:, bit] for bit in range(state.shape[1]) if past_tokens >> bit & 1}
    outs = []
    with no_autocast(x):
        for start, stop, size in _aligned(past_tokens, length, chunk_size):
            chunks = [torch.unflatten(part[:, :, start:stop], 2, (-1, size)) for part in inputs]
            out, states = _chunks(*chunks, states=states, first=past_tokens + start)
            outs.append(out.flatten(2, 3))
        some = next(iter(states.values()))
        bits = range((past_tokens + length).bit_length())
        last = torch.stack([states[bit] if bit in states else torch.zeros_like(some) for bit in bits], 1)
    return torch.cat(outs, 2).transpose(1, 2).flatten(2, 3).to(x.dtype), last


def _aligned(past_tokens: int, length: int, size: int) -> list[tuple[int, int, int]]:
    """Return start, stop and piece size of the tokens up to the first border, of whole chunks, and of the rest."""
    head = min(length, -past_tokens % size)
    whole = head + (length - head) // size * size
    spans = ((0, head, head), (head, whole, size), (whole, length, length - whole))
    return [span for span in spans if span[0] < span[1]]


def _chunks(
    c: Tensor, b: Tensor, x: Tensor, log_g: Tensor, weight: Tensor, *, states: States, first: int
) -> tuple[Tensor, States]:
    """Return the outputs [B, G, n, C, R, V] of n chunks that follow each other, and the states after them.

    first: the index of the first token in its sequence. More than one chunk begin at multiples of C.
    """
    chunks, size = c.shape[2:4]
    cumsum = log_g.clamp(min=MIN_LOG_G[log_g.dtype]).cumsum(-2)  # [B, G, n, C, R]
    total = cumsum[..., -1:, :]
    index = torch.arange(size, device=c.device) + first % size if chunks > 1 else torch.arange(size) + first
    index = index.to(c.device)
    level = _bit_length(index[:, None] ^ index)  # [C, C]
    by_head = weight.transpose(-3, -2)  # [B, G, n, R, C, L]
    of_pairs = by_head.gather(-1, level.expand(*by_head.shape[:-2], size, size))
    out = (chunk_products(c, b, cumsum) * of_pairs) @ x.transpose(-3, -2)
    out = out.transpose(-3, -2)
    to_end = x * (total - cumsum).exp()[..., None]
    decay = total.exp()[..., None]  # [B, G, n, 1, R, 1]
    buckets = _buckets(first, size)
    updates = [
        (bit, torch.unflatten(b[..., own, :].mT @ to_end[..., own, :, :].flatten(-2), -1, x.shape[-2:]))
        for bit, own in buckets
    ]
    before: dict[int, list[tuple[int, Tensor]]] = {}
    for at in range(chunks):
        start = first + at * size
        for bit, state in states.items():
            before.setdefault(bit, []).append((at, state))
        states = _merged({bit: decay[:, :, at] * state for bit, state in states.items()}, start, start + size)
        for bit, update in updates:
            bucket = bit if chunks == 1 else _highest_bit(start, start + size)
            states[bucket] = states[bucket] + update[:, :, at] if bucket in states else update[:, :, at]
    for bit, found in before.items():
        ids = torch.tensor([at for at, _ in found], device=c.device)
        read = c.index_select(2, ids) @ torch.stack([state for _, state in found], 2).flatten(-2)
        # A state that was there before a chunk that begins within a bucket merges with later tokens while it runs.
        through = _bit_length(index ^ index[0]).clamp(min=bit + 1).view(size, 1, 1)
        own = weight.index_select(2, ids)
        own = own.gather(-1, through.expand(*own.shape[:-1], 1))
        faded = own * cumsum.index_select(2, ids).exp()[..., None]
        out = out.index_add(2, ids, torch.unflatten(read, -1, x.shape[-2:]) * faded)
    return out, states


def _bit_length(x: Tensor) -> Tensor:
    """Return how many bits each of the integers x has, 0 for 0."""
    bits = torch.arange(63, device=x.device)
    return (x[..., None] >> bits > 0).sum(-1)


def _highest_bit(i: int, j: int) -> int:
    """Return the highest bit in which two different integers differ."""
    return (i ^ j).bit_length() - 1


def _buckets(first: int, size: int) -> list[tuple[int, slice]]:
    """Return the buckets that tokens first ... first + size - 1 are in after the last of them, and their tokens."""
    end, found = first + size, []
    start = first
    while start < end:
        bit = _highest_bit(end, start)
        # The bucket ends where the bits of `end` below this one begin to count.
        stop = min(end, end >> bit << bit)
        found.append((bit, slice(start - first, stop - first)))
        start = stop
    return found


def _merged(states: States, start: int, end: int) -> States:
    """Return the states by the bits of `end` that those by the bits of `start` become."""
    merged: States = {}
    for bit, state in states.items():
        bucket = max(bit, _highest_bit(start, end))
        merged[bucket] = merged[bucket] + state if bucket in merged else state
    return merged


def log_linear_state(b: Tensor, x: Tensor, log_g: Tensor, first: int, levels: int) -> tuple[Tensor, Tensor]:
    """Return the states that tokens leave behind in log-linear attention, without queries.

    The states after tokens that follow others are their own states plus their transition times the states before, with
    the levels in the place of features.

    Args:
        b: [B, T, G, K].
        x: [B, T, H, V].
        log_g: Natural logarithms of the decays [B, T, H], at most 0.
        first: The index of the first token in its sequence.
        levels: L, at least as many as the index of the token after the last one has bits.

    Returns:
        The states [B, L, G, K, R, V] of the buckets after the last token, by their bits, of these tokens alone; and the
        transition of each head [B, H, L, L]: the decay where a bit's state becomes a part of another bit's, else 0.
    """
    faded, decay = faded_to_end(x, log_g, b.shape[2])
    end = first + x.shape[1]
    keys = b.to(faded.dtype).permute(0, 2, 3, 1)
    some = faded.new_zeros(*keys.shape[:3], *faded.shape[-2:])
    found = [some] * levels
    with no_autocast(x):
        for bit, own in _buckets(first, x.shape[1]):
            found[bit] = torch.unflatten(keys[..., own] @ faded[:, :, own].flatten(-2), -1, faded.shape[-2:])
    merges = decay.new_zeros(levels, levels)
    for bit in range(first.bit_length()):
        if first >> bit & 1:
            merges[max(bit, _highest_bit(first, end)), bit] = 1
    return torch.stack(found, 1), decay[..., None, None] * merges


def log_linear_step(
    c: Tensor, b: Tensor, x: Tensor, log_g: Tensor, weight: Tensor, state: Tensor, past_tokens: int
) -> tuple[Tensor, Tensor]:
    """Process one more token.

    Args:
        c: [B, G, K].
        b: [B, G, K].
        x: [B, H, V].
        log_g: Natural logarithms of the decays [B, H].
        weight: Weights of the levels [B, H, L].
        state: States [B, l, G, K, R, V] of all l bits of past_tokens, zeros for its 0 bits.
        past_tokens: How many tokens came before.

    Returns:
        The output [B, H, V] in the dtype of x, and the states after this token.
    """
    dtype, out_dtype, groups, bits = state.dtype, x.dtype, c.shape[1], state.shape[1]
    c, b = c.to(dtype)[..., None, :], b.to(dtype)[..., None]
    decay = torch.unflatten(log_g.to(dtype).clamp(min=MIN_LOG_G[dtype]).exp(), 1, (groups, 1, -1, 1))
    weight = torch.unflatten(weight.to(dtype), 1, (groups, -1)).movedim(-1, 1)[..., None]  # [B, L, G, R, 1]
    with no_autocast(state):
        heads = state.shape[-2:]
        own = torch.unflatten(b @ torch.unflatten(x.to(dtype), 1, (groups, -1)).flatten(2)[..., None, :], -1, heads)
        state = decay[:, None] * state
        read = torch.unflatten((c[:, None] @ state.flatten(-2)).squeeze(-2), -1, heads)
        out = weight[:, 0] * torch.unflatten((c @ own.flatten(-2)).squeeze(-2), -1, heads)
        out = out + (weight[:, 1 : bits + 1] * read).sum(1)
        bit = _highest_bit(past_tokens, past_tokens + 1)
        own = own + state[:, :bit].sum(1)
        lower, higher = torch.zeros_like(state[:, :bit]), state[:, bit + 1 :]
        state = torch.cat((lower, own[:, None], higher), 1)
    return out.flatten(1, 2).to(out_dtype), state
