"""Power attention in chunks, in plain torch, for any device: attention within a chunk, a state between chunks.

The four stages of arXiv 2507.04239, Appendix F, in one loop over chunks, forward and backward. Inside a chunk time is
the last dim ([N, d, M]), so that expanding phi writes whole rows. phi exists one block at a time, in one buffer; the
state lies block by block likewise, [N, W, rows], so that what meets in a product is contiguous. All buffers are made
once for a call, and all views of them, so that the forward pass takes no more memory for a longer context. Training
keeps a state for every EVERY chunks, and recomputes that many at a time on the way back.

Legend: B sequences, T tokens, G key/value heads, R query heads to each, K and V head dims; M tokens of a chunk,
N = B G, W = V and one column of ones for the normaliser, D rows of phi.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from powerplan.kernels.state import divisor
from powerplan.kernels.tiles import Expander, Puller, Tiling, tiling

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

    @property
    def count(self) -> int:
        return self.batch * self.groups

    def chunks(self) -> list[slice]:
        return [slice(start, min(start + self.chunk, self.tokens)) for start in range(0, self.tokens, self.chunk)]

    def room(self, like: Tensor) -> Tensor:
        """Return room for one block of phi, flat."""
        rows = max(block.width for block in self.layout.blocks)
        return like.new_empty(self.count * rows * self.repeats * min(self.chunk, self.tokens))


class State:
    """N states of D x W, in one flat tensor block by block: blocks[b] is [N, W, rows]."""

    def __init__(self, plan: Plan, flat: Tensor) -> None:
        self.plan, self.flat = plan, flat
        sizes = [plan.count * plan.columns * block.width for block in plan.layout.blocks]
        self.blocks = [part.view(plan.count, plan.columns, -1) for part in flat.view(-1).split(sizes)]

    @staticmethod
    def of(plan: Plan, whole: Tensor | None, like: Tensor) -> State:
        """Return `whole`, [N, D, W], as a new State; an empty one for None, of the dtype of `like`."""
        state = State(plan, like.new_zeros(plan.count * plan.layout.dim * plan.columns))
        if whole is not None:
            for block, part in zip(plan.layout.blocks, state.blocks, strict=True):
                part.copy_(whole[:, block.first : block.first + block.width].mT)
        return state

    def whole(self) -> Tensor:
        """Return [N, D, W]."""
        return torch.cat(self.blocks, 2).mT.contiguous()

    def copy(self) -> State:
        """Return a State of its own memory."""
        return State(self.plan, self.flat.clone())

    def decay(self, factor: Tensor | None) -> None:
        """Multiply all by [N, 1, 1]."""
        if factor is not None:
            for block in self.blocks:
                block.mul_(factor)


class Chunk:
    """Buffers for a chunk of `size` tokens of all heads, time last: q [N, d, R M] scaled, k [N, d, M], v [N, W, M]."""

    def __init__(self, plan: Plan, size: int, room: Tensor) -> None:
        self.plan, self.size = plan, size
        self.q = room.new_zeros(plan.count, plan.d, plan.repeats * size)
        self.k = room.new_zeros(plan.count, plan.d, size)
        self.v = room.new_ones(plan.count, plan.columns, size)
        self.total = room.new_empty(plan.count, plan.columns, plan.repeats * size)
        self.scores = room.new_empty(plan.count, size, plan.repeats * size)
        self.mask = room.new_ones(size, size).triu()
        self.queries, self.keys = Expander(self.q, plan.layout, room), Expander(self.k, plan.layout, room)
        self.decay: Tensor | None = None

    def load(self, at: slice, q: Tensor | None, k: Tensor, v: Tensor, log_g: Tensor | None) -> None:
        """Fill the buffers with the tokens `at`; without q where only keys are needed."""
        plan = self.plan
        if q is not None:
            self.by_head(self.q[:, : plan.key_dim]).copy_(self.split(q[:, at]))
            self.q.mul_(plan.scale)
        self.by_group(self.k[:, : plan.key_dim]).copy_(k[:, at])
        self.by_group(self.v[:, : plan.value_dim]).copy_(v[:, at])
        if log_g is not None:
            # [B, M, G] -> [N, M]: cumulative sums of the gates.
            self.decay = log_g[:, at].transpose(1, 2).reshape(-1, self.size).to(self.k.dtype).cumsum(-1)

    def split(self, x: Tensor) -> Tensor:
        """[B, M, H, ...] -> [B, M, G, R, ...], a view."""
        return x.unflatten(2, (self.plan.groups, self.plan.repeats))

    def by_head(self, x: Tensor) -> Tensor:
        """[N, d, R M] -> [B, M, G, R, d], a view."""
        plan = self.plan
        return x.unflatten(2, (plan.repeats, -1)).unflatten(0, (plan.batch, plan.groups)).permute(0, 4, 1, 3, 2)

    def by_group(self, x: Tensor) -> Tensor:
        """[N, d, M] -> [B, M, G, d], a view."""
        return x.unflatten(0, (self.plan.batch, self.plan.groups)).permute(0, 3, 1, 2)

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

    def between(self) -> Tensor:
        """The causal mask times exp(a_i - a_j), keys by queries, [1 or N, M, 1, M]; never inf."""
        if self.decay is None:
            return self.mask[None, :, None]
        apart = self.decay[:, None, :] - self.decay[:, :, None]
        return apart.clamp_(max=0).exp_().mul_(self.mask)[:, :, None]

    def spread(self, x: Tensor) -> Tensor:
        """[N, M, R M] -> [N, M, R, M], a view."""
        return x.view(-1, self.size, self.plan.repeats, self.size)

    def ask(self, state: State) -> None:
        """Put phi(q)^T S, times exp(a), into `total`."""
        total = self.total
        for index, (block, part) in enumerate(zip(self.plan.layout.blocks, state.blocks, strict=True)):
            # [N, W, D] @ [N, D, R M]
            total.baddbmm_(part, self.queries.expand(index), beta=min(index, 1), alpha=block.weight)
        since = self.since_start()
        if since is not None:
            total.mul_(since)

    def attend(self, seen: bool) -> None:
        """Add attention within the chunk to `total`, or put it there if nothing was `seen` before."""
        torch.bmm(self.k.mT, self.q, out=self.scores)  # [N, M, d] @ [N, d, R M]
        self.spread(self.scores.pow_(self.plan.p)).mul_(self.between())
        self.total.baddbmm_(self.v, self.scores, beta=int(seen))  # [N, W, M] @ [N, M, R M]

    def update(self, state: State) -> None:
        """Take the chunk into `state`."""
        state.decay(self.over_all())
        values = self.kept_values()
        for index, part in enumerate(state.blocks):
            part.baddbmm_(values, self.keys.expand(index).mT)  # [N, W, M] @ [N, M, D]


class Gradients:
    """Gradients of a chunk's q, k and v, in its layout, from `asked`: those of its sums of weights, [N, W, R M]."""

    def __init__(self, chunk: Chunk, room: Tensor) -> None:
        plan = chunk.plan
        self.chunk, self.plan = chunk, plan
        self.q, self.k, self.v = (torch.empty_like(x) for x in (chunk.q, chunk.k, chunk.v))
        self.asked, self.weights = torch.empty_like(chunk.total), torch.empty_like(chunk.scores)
        self.slope = torch.empty_like(chunk.scores)
        self.queries, self.keys = Puller(chunk.queries, room, self.q), Puller(chunk.keys, room, self.k)

    def load(self, at: slice, grad_out: Tensor, out: Tensor, norm: Tensor) -> None:
        """Fill `asked` for the tokens `at` from the gradient of the output."""
        chunk, grad = self.chunk, grad_out[:, at]
        chunk.by_head(self.asked[:, : self.plan.value_dim]).copy_(chunk.split(grad))
        if self.plan.normalize:
            of_norm = (grad.to(self.asked.dtype) * out[:, at]).sum(-1).neg_().masked_fill_(norm[:, at] == 0, 0)
            chunk.by_head(self.asked[:, -1:]).copy_(chunk.split(of_norm)[..., None])
            sums = torch.empty_like(self.asked[:, :1])
            chunk.by_head(sums).copy_(chunk.split(divisor(norm[:, at]))[..., None])
            self.asked.div_(sums)

    def attend(self) -> None:
        """Put what comes from attention within the chunk into q, k and v."""
        chunk, p = self.chunk, self.plan.p
        scores, weights, slope = chunk.scores, self.weights, self.slope
        torch.bmm(chunk.k.mT, chunk.q, out=scores)  # [N, M, d] @ [N, d, R M]
        between = chunk.between()
        if p == 1:
            chunk.spread(weights).copy_(between)
        else:
            torch.mul(chunk.spread(scores if p == 2 else scores.pow(p - 1)), between, out=chunk.spread(weights))
        torch.bmm(chunk.v.mT, self.asked, out=slope)  # [N, M, W] @ [N, W, R M]
        slope.mul_(weights)
        weights.mul_(scores)
        torch.bmm(self.asked, weights.mT, out=self.v)  # [N, W, R M] @ [N, R M, M]
        self.q.baddbmm_(chunk.k, slope, beta=0, alpha=p)  # [N, d, M] @ [N, M, R M]
        self.k.baddbmm_(chunk.q, slope.mT, beta=0, alpha=p)  # [N, d, R M] @ [N, R M, M]

    def update(self, slope: State) -> None:
        """Add what comes from the state after the chunk, whose gradient is `slope`, to k and v."""
        chunk = self.chunk
        values, to_end = chunk.kept_values(), chunk.to_end()
        by_value = self.v if to_end is None else torch.zeros_like(self.v)
        for index, part in enumerate(slope.blocks):
            by_value.baddbmm_(part, chunk.keys.expand(index))  # [N, W, D] @ [N, D, M]
            torch.bmm(part.mT, values, out=self.keys.rows[index])  # [N, D, W] @ [N, W, M]
            self.keys.pull(index)
        if to_end is not None:
            self.v.addcmul_(by_value, to_end)

    def ask(self, before: State, slope: State) -> None:
        """Add what comes from the state before the chunk to q, and what goes to its gradient to `slope`."""
        chunk, since = self.chunk, self.chunk.since_start()
        asked = self.asked if since is None else self.asked.mul_(since)
        for index, (block, part) in enumerate(zip(self.plan.layout.blocks, before.blocks, strict=True)):
            phi = chunk.queries.expand(index)
            slope.blocks[index].baddbmm_(asked, phi.mT, alpha=block.weight)  # [N, W, R M] @ [N, R M, D]
            # [N, D, W] @ [N, W, R M]
            self.queries.rows[index].baddbmm_(part.mT, asked, beta=0, alpha=block.weight)
            self.queries.pull(index)

    def of_decay(self) -> Tensor:
        """Return the gradient of a = cumsum(log_g), [B, M, G], but for what the final state's adds."""
        chunk, plan = self.chunk, self.plan
        by_query = (chunk.q * self.q).sum(1).view(plan.count, plan.repeats, -1).sum(1)
        by_key = (chunk.k * self.k).sum(1)
        return (by_query - by_key).div_(plan.p).view(plan.batch, plan.groups, -1).transpose(1, 2)


class Desk:
    """One Chunk for each size there is (the last may be shorter), and its gradients, all with the same room for phi."""

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.plan, self.like, self.room = plan, like, plan.room(like)
        self.chunks: dict[int, Chunk] = {}
        self.grads: dict[int, Gradients] = {}

    def chunk(self, at: slice) -> Chunk:
        size = at.stop - at.start
        if size not in self.chunks:
            self.chunks[size] = Chunk(self.plan, size, self.room)
        return self.chunks[size]

    def gradients(self, at: slice) -> Gradients:
        size = at.stop - at.start
        if not self.grads:
            self.second = self.plan.room(self.like)
        if size not in self.grads:
            self.grads[size] = Gradients(self.chunk(at), self.second)
        return self.grads[size]


def _work(x: Tensor) -> Tensor:
    """Return an empty tensor of the dtype that the arithmetic is done in: float32, or float64."""
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


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
    keep: store the state before every EVERY-th chunk for the backward pass, [pieces, N, D, W] with the numbers of each
        in the order of `State`; an empty one before the first chunk is left out.
    want_state: without it the last chunk is not added, and None is returned.
    """
    work = _work(q)
    heads = plan.groups * plan.repeats
    out = v.new_empty(plan.batch, plan.tokens, heads, plan.value_dim)
    norm = work.new_empty(plan.batch, plan.tokens, heads if plan.normalize else 0)
    seen = state is not None
    running, desk = State.of(plan, state, work), Desk(plan, work)
    chunks = plan.chunks()
    first = int(state is None)
    pieces = -(-len(chunks) // EVERY) - first if keep else 0
    kept = work.new_empty(pieces, plan.count, plan.layout.dim, plan.columns)
    for index, at in enumerate(chunks):
        if keep and index % EVERY == 0 and seen:
            kept[index // EVERY - first].view(-1).copy_(running.flat)
        chunk = desk.chunk(at)
        chunk.load(at, q, k, v, log_g)
        if seen:
            with record_function("power: query state"):
                chunk.ask(running)
        with record_function("power: within chunk"):
            chunk.attend(seen)
        if want_state or index < len(chunks) - 1:
            with record_function("power: update state"):
                chunk.update(running)
        total, seen = chunk.total, True
        if plan.normalize:
            sums = total[:, -1:]
            chunk.split(norm[:, at])[..., None].copy_(chunk.by_head(sums))
            total[:, :-1].div_(divisor(sums))
        chunk.split(out[:, at]).copy_(chunk.by_head(total[:, : plan.value_dim]))
    return out, norm, running.whole() if want_state else None, kept


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
    work = _work(q)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    towards = work.new_empty(plan.batch, plan.tokens, plan.groups) if log_g is not None else None
    slope, desk = State.of(plan, grad_state, work), Desk(plan, work)
    adding = grad_state is not None
    for at, before in _states_backwards(k, v, log_g, kept, desk, plan, with_state):
        chunk, grads = desk.chunk(at), desk.gradients(at)
        chunk.load(at, q, k, v, log_g)
        grads.load(at, grad_out, out, norm)
        with record_function("power: within chunk, backward"):
            grads.attend()
        if adding:
            with record_function("power: update state, backward"):
                grads.update(slope)
        slope.decay(chunk.over_all())
        if before is not None:
            with record_function("power: query state, backward"):
                grads.ask(before, slope)
        adding = True
        if towards is not None:
            towards[:, at] = grads.of_decay()
        chunk.split(grad_q[:, at]).copy_(chunk.by_head(grads.q.mul_(plan.scale)[:, : plan.key_dim]))
        grad_k[:, at] = chunk.by_group(grads.k[:, : plan.key_dim])
        grad_v[:, at] = chunk.by_group(grads.v[:, : plan.value_dim])
    if towards is not None and reach is not None:
        towards[:, -1] += reach
    grad_g = None if towards is None else towards.flip(1).cumsum(1).flip(1)
    return grad_q, grad_k, grad_v, grad_g, slope.whole()


def _states_backwards(
    k: Tensor, v: Tensor, log_g: Tensor | None, kept: Tensor, desk: Desk, plan: Plan, with_state: bool
) -> Iterator[tuple[slice, State | None]]:
    """Yield the chunks from the last to the first, each with the state before it, recomputed between those kept.

    The state before the first chunk is None where there was no initial one.
    """
    chunks = plan.chunks()
    for segment in reversed(range(-(-len(chunks) // EVERY))):
        part = chunks[segment * EVERY : (segment + 1) * EVERY]
        first = segment == 0 and not with_state
        restart = State.of(plan, None, desk.like) if first else State(plan, kept[segment - int(not with_state)])
        states = [restart]
        for at in part[:-1]:
            chunk = desk.chunk(at)
            chunk.load(at, None, k, v, log_g)
            state = states[-1].copy()
            with record_function("power: update state, again"):
                chunk.update(state)
            states.append(state)
        while states:
            at, before = part[len(states) - 1], states.pop()
            yield at, None if first and not states else before
