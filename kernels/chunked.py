"""Power attention in chunks, in plain torch, for any device: attention within a chunk, a state between chunks.

The four stages of arXiv 2507.04239, Appendix F, in one loop over chunks, forward and backward. Inside a chunk time is
the last dim ([N, d, M]), so that expanding phi writes whole rows. phi exists one block at a time, in one buffer, and
the state in another, so that the forward pass takes no more memory for a longer context. Training keeps a state for
every EVERY chunks, and recomputes that many at a time on the way back.

Legend: B sequences, T tokens, G key/value heads, R query heads to each, K and V head dims; M tokens of a chunk,
N = B G, W = V and one column of ones for the normaliser, D rows of phi.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from powerplan.kernels.state import divisor
from powerplan.kernels.tiles import Block, Expander, Tiling, tiling

BLOCK_ROWS = 600
"""Rows of phi expanded at a time. At 4 heads and chunks of 384 that is 3.7 MB; on two cores of 1 MB L2 each, 600 was
faster than 300, 1,200 and 2,400 (K = V = 64, p = 2)."""

TILE = 8

EVERY = 8
"""The backward pass stores the state before each EVERY-th chunk and recomputes those between.

At K = V = 64, p = 2 that is 195 bytes per token and key/value head with chunks of 384, less than q, k and v take.
"""


@dataclass(frozen=True)
class Plan:
    """What stays the same over a call. d is K padded to whole tiles; columns is W."""

    p: int
    scale: float
    chunk: int
    normalize: bool
    batch: int
    tokens: int
    groups: int
    repeats: int
    key_dim: int
    value_dim: int

    @property
    def tile(self) -> int:
        return min(TILE, self.key_dim)

    @property
    def d(self) -> int:
        return -(-self.key_dim // self.tile) * self.tile

    @property
    def layout(self) -> Tiling:
        return tiling(self.d, self.p, self.tile, BLOCK_ROWS)

    @property
    def columns(self) -> int:
        return self.value_dim + int(self.normalize)

    def chunks(self) -> list[slice]:
        return [slice(start, min(start + self.chunk, self.tokens)) for start in range(0, self.tokens, self.chunk)]


class Chunk:
    """One chunk of all heads, time last: q [N, d, R M] scaled, k [N, d, M], v [N, W, M], decay [N, M] or None."""

    def __init__(self, plan: Plan, at: slice, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> None:
        self.plan, self.size = plan, at.stop - at.start
        self.q = self._heads(q[:, at], plan.key_dim, plan.d).mul_(plan.scale)
        self.k = self._rows(k[:, at], plan.d)
        self.v = self._rows(v[:, at], plan.columns)
        if plan.normalize:
            self.v[:, plan.value_dim :].fill_(1)
        gates = None if log_g is None else log_g[:, at].transpose(1, 2).reshape(-1, self.size)
        self.decay = None if gates is None else gates.to(self.k.dtype).cumsum(-1)

    def _rows(self, x: Tensor, rows: int) -> Tensor:
        """[B, M, G, d] -> [N, rows, M], rows beyond d left zero."""
        out = _work(x).new_zeros(x.shape[0], x.shape[2], rows, x.shape[1])
        out[:, :, : x.shape[3]] = x.permute(0, 2, 3, 1)
        return out.view(-1, rows, x.shape[1])

    def _heads(self, x: Tensor, dim: int, rows: int) -> Tensor:
        """[B, M, H, d] -> [N, rows, R M], rows beyond d left zero."""
        groups, repeats = self.plan.groups, self.plan.repeats
        out = _work(x).new_zeros(x.shape[0], groups, rows, repeats, self.size)
        out[:, :, :dim] = x.view(*x.shape[:2], groups, repeats, dim).permute(0, 2, 4, 3, 1)
        return out.view(-1, rows, repeats * self.size)

    def heads_back(self, x: Tensor) -> Tensor:
        """[N, d, R M] -> [B, M, H, d]."""
        plan = self.plan
        spread = x.view(plan.batch, plan.groups, x.shape[1], plan.repeats, self.size)
        return spread.permute(0, 4, 1, 3, 2).reshape(plan.batch, self.size, plan.groups * plan.repeats, x.shape[1])

    def rows_back(self, x: Tensor) -> Tensor:
        """[N, d, M] -> [B, M, G, d]."""
        return x.view(self.plan.batch, self.plan.groups, x.shape[1], self.size).permute(0, 3, 1, 2)

    def since_start(self) -> Tensor | None:
        """exp(a) of the queries, [N, 1, R M]: how much of the state before the chunk each still sees."""
        return None if self.decay is None else self.decay.exp().repeat(1, self.plan.repeats)[:, None]

    def to_end(self) -> Tensor | None:
        """exp(a_M - a) of the keys, [N, 1, M]: how much of each the state after the chunk keeps."""
        return None if self.decay is None else (self.decay[:, -1:] - self.decay).exp()[:, None]

    def over_all(self) -> Tensor | None:
        """exp(a_M), [N, 1, 1]: how much of the state before the chunk is left after it."""
        return None if self.decay is None else self.decay[:, -1:, None].exp()

    def kept_values(self) -> Tensor:
        """v exp(a_M - a), [N, W, M]: what the chunk adds to the state."""
        to_end = self.to_end()
        return self.v if to_end is None else self.v * to_end

    def between(self, x: Tensor) -> Tensor:
        """Multiply x, [N, M, R M] keys by queries, in place by the causal mask and exp(a_i - a_j); never inf."""
        spread = x.view(-1, self.size, self.plan.repeats, self.size)
        mask = torch.ones(self.size, self.size, dtype=torch.bool, device=x.device).triu()
        if self.decay is None:
            spread.mul_(mask[:, None])
        else:
            apart = self.decay[:, None, :] - self.decay[:, :, None]
            spread.mul_(apart.masked_fill_(~mask, -torch.inf).exp_()[:, :, None])
        return x

    def scores(self) -> Tensor:
        """q.k, keys by queries, [N, M, R M]."""
        return self.k.mT @ self.q  # [N, M, d] @ [N, d, R M]


def _work(x: Tensor) -> Tensor:
    """Return an empty tensor of the dtype that the arithmetic is done in: float32, or float64."""
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


class Buffer:
    """Room for one block of phi and one of its gradient, made once for a call."""

    def __init__(self, plan: Plan, like: Tensor) -> None:
        rows = max(block.width for block in plan.layout.blocks)
        size = plan.batch * plan.groups * rows * plan.repeats * min(plan.chunk, plan.tokens)
        self.room = like.new_empty(size)

    def view(self, count: int, width: int, size: int) -> Tensor:
        return self.room[: count * width * size].view(count, width, size)


def _update(piece: Chunk, state: Tensor, buffer: Buffer, block: Block, keys: Expander, values: Tensor) -> None:
    part = state[:, block.first : block.first + block.width]
    over_all = piece.over_all()
    if over_all is not None:
        part.mul_(over_all)
    phi = keys.expand(block, buffer.view(state.shape[0], block.width, piece.size))
    part.baddbmm_(phi, values.mT)  # [N, D, M] @ [N, M, W]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    plan: Plan,
    keep: bool,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return out [B, T, H, V], the sums of weights [B, T, H], the final state [N, D, W], and states to restart from.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log_g [B, T, G], state [N, D, W] (tiled) or None for an empty one.
    keep: store the state before every EVERY-th chunk, [pieces, N, D, W], for the backward pass; an empty one before
        the first chunk is left out. want_state: without it the last chunk is not added, and None is returned.
    """
    layout, work = plan.layout, _work(q)
    count = plan.batch * plan.groups
    heads = plan.groups * plan.repeats
    out = v.new_empty(plan.batch, plan.tokens, heads, plan.value_dim)
    norm = work.new_empty(plan.batch, plan.tokens, heads if plan.normalize else 0)
    seen = state is not None
    running = work.new_zeros(count, layout.dim, plan.columns) if state is None else state.clone()
    buffer = Buffer(plan, work)
    chunks = plan.chunks()
    kept = []
    for index, at in enumerate(chunks):
        if keep and index % EVERY == 0 and seen:
            kept.append(running.clone())
        piece = Chunk(plan, at, q, k, v, log_g)
        weights = piece.between(piece.scores().pow_(plan.p))
        total = piece.v @ weights  # [N, W, M] @ [N, M, R M] -> [N, W, R M]
        queries, keys = Expander(piece.q, layout, weighted=False), Expander(piece.k, layout, weighted=True)
        values = piece.kept_values()
        asked = torch.zeros_like(total) if seen else None
        adding = want_state or index < len(chunks) - 1
        for block in layout.blocks if seen or adding else ():
            if asked is not None:
                phi = queries.expand(block, buffer.view(count, block.width, piece.q.shape[-1]))
                part = running[:, block.first : block.first + block.width]
                asked.baddbmm_(part.mT, phi)  # [N, W, D] @ [N, D, R M]
            if adding:
                _update(piece, running, buffer, block, keys, values)
        if asked is not None:
            since = piece.since_start()
            total += asked if since is None else asked.mul_(since)
        result = piece.heads_back(total)
        if plan.normalize:
            norm[:, at] = result[..., -1]
            result = result[..., :-1] / divisor(result[..., -1:])
        out[:, at] = result
        seen = True
    restart = torch.stack(kept) if kept else running.new_empty(0, *running.shape)
    return out, norm, running if want_state else None, restart


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    out: Tensor,
    norm: Tensor,
    kept: Tensor,
    reach: Tensor | None,
    plan: Plan,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of q, k, v, log_g (None without gates) and of the initial state, [N, D, W].

    reach: <dS, S> of the final state, [B, G], where it has a gradient. with_state: whether there was an initial state;
    if not, the gradient returned for it means nothing.

    The gate's gradient needs no pass of its own: every weight is homogeneous of degree p in its query and in its key,
    so dL/da_i = (q_i.dq_i - k_i.dk_i) / p, plus <dS, S> at the last token; dL/dlog_g is its reverse cumulative sum.
    """
    layout, work = plan.layout, _work(q)
    count = plan.batch * plan.groups
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    towards = work.new_empty(plan.batch, plan.tokens, plan.groups) if log_g is not None else None
    grad = work.new_zeros(count, layout.dim, plan.columns) if grad_state is None else grad_state.clone()
    buffer, pulled = Buffer(plan, work), Buffer(plan, work)
    adding = grad_state is not None
    for at, before in _states_backwards(q, k, v, log_g, kept, buffer, plan, with_state):
        piece = Chunk(plan, at, q, k, v, log_g)
        asked = _sums_gradient(piece, grad_out[:, at], out[:, at], norm[:, at])  # [N, W, R M]
        scores = piece.scores()
        below = scores.pow(plan.p - 1)
        weights = piece.between(below * scores)
        piece_q, piece_k = torch.zeros_like(piece.q), torch.zeros_like(piece.k)
        piece_v = asked @ weights.mT  # [N, W, R M] @ [N, R M, M]
        slope = piece.between(below.mul_(plan.p)).mul_(piece.v.mT @ asked)  # [N, M, W] @ [N, W, R M]
        piece_q += piece.k @ slope  # [N, d, M] @ [N, M, R M]
        piece_k += piece.q @ slope.mT  # [N, d, R M] @ [N, R M, M]
        since, to_end, over_all = piece.since_start(), piece.to_end(), piece.over_all()
        asked = asked if since is None else asked * since
        values, grad_values = piece.kept_values(), torch.zeros_like(piece.v)
        queries, keys = Expander(piece.q, layout, weighted=False), Expander(piece.k, layout, weighted=True)
        for block in layout.blocks if adding or before is not None else ():
            rows = slice(block.first, block.first + block.width)
            share, width = grad[:, rows], block.width
            if adding:
                phi = keys.expand(block, buffer.view(count, width, piece.size))
                grad_values.baddbmm_(share.mT, phi)  # [N, W, D] @ [N, D, M]
                slope_phi = pulled.view(count, width, piece.size)
                torch.bmm(share, values, out=slope_phi)  # [N, D, W] @ [N, W, M]
                keys.pull_back(block, slope_phi, piece_k)
            if over_all is not None:
                share.mul_(over_all)
            if before is None:
                continue
            phi = queries.expand(block, buffer.view(count, width, piece.q.shape[-1]))
            share.baddbmm_(phi, asked.mT)  # [N, D, R M] @ [N, R M, W]
            slope_phi = pulled.view(count, width, piece.q.shape[-1])
            torch.bmm(before[:, rows], asked, out=slope_phi)  # [N, D, W] @ [N, W, R M]
            queries.pull_back(block, slope_phi, piece_q)
        adding = True
        piece_v += grad_values if to_end is None else grad_values.mul_(to_end)
        if towards is not None:
            by_query = (piece.q * piece_q).sum(1).view(count, plan.repeats, -1).sum(1)
            by_key = (piece.k * piece_k).sum(1)
            towards[:, at] = piece.rows_back((by_query - by_key)[:, None])[..., 0] / plan.p
        grad_q[:, at] = piece.heads_back(piece_q.mul_(plan.scale))[..., : plan.key_dim]
        grad_k[:, at] = piece.rows_back(piece_k)[..., : plan.key_dim]
        grad_v[:, at] = piece.rows_back(piece_v)[..., : plan.value_dim]
    if towards is not None and reach is not None:
        towards[:, -1] += reach
    grad_g = None if towards is None else towards.flip(1).cumsum(1).flip(1)
    return grad_q, grad_k, grad_v, grad_g, grad


def _sums_gradient(piece: Chunk, grad_out: Tensor, out: Tensor, norm: Tensor) -> Tensor:
    """Return the gradient of the weighted sums and of the normaliser, [N, W, R M], from that of the output."""
    plan, grad = piece.plan, grad_out.to(piece.v.dtype)
    if plan.normalize:
        grad = grad / divisor(norm)[..., None]
        of_norm = -(grad * out).sum(-1, keepdim=True).masked_fill(norm[..., None] == 0, 0)
        grad = torch.cat((grad, of_norm), -1)
    spread = grad.view(plan.batch, piece.size, plan.groups, plan.repeats, plan.columns)
    return spread.permute(0, 2, 4, 3, 1).reshape(-1, plan.columns, plan.repeats * piece.size)


def _states_backwards(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    kept: Tensor,
    buffer: Buffer,
    plan: Plan,
    with_state: bool,
) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield the chunks from the last to the first, each with the state before it, recomputed between those kept.

    The state before the first chunk is None where there was no initial one.
    """
    chunks = plan.chunks()
    for segment in reversed(range(-(-len(chunks) // EVERY))):
        part = chunks[segment * EVERY : (segment + 1) * EVERY]
        missing = int(not with_state)
        first = segment == 0 and not with_state
        states = [kept.new_zeros(kept.shape[1:]) if first else kept[segment - missing]]
        for at in part[:-1]:
            piece = Chunk(plan, at, q, k, v, log_g)
            keys, values = Expander(piece.k, plan.layout, weighted=True), piece.kept_values()
            state = states[-1].clone()
            for block in plan.layout.blocks:
                _update(piece, state, buffer, block, keys, values)
            states.append(state)
        while states:
            at, before = part[len(states) - 1], states.pop()
            yield at, None if first and not states else before
