"""One chunk of all heads, forward and backward: attention within it, what it asks of the state, what it adds to it.

Time is the last dim ([N, d, M]), so that expanding phi writes whole rows, and each product takes contiguous operands.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from powerplan.kernels.plan import Plan, State
from powerplan.kernels.state import divisor
from powerplan.kernels.tiles import Expander, Puller


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
        self.room = room
        self.decay: Tensor | None = None

    # A sequence of one chunk never needs phi.
    @cached_property
    def queries(self) -> Expander:
        return Expander(self.q, self.plan.layout, self.room)

    @cached_property
    def keys(self) -> Expander:
        return Expander(self.k, self.plan.layout, self.room)

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
        return x.view(*x.shape[:2], self.plan.groups, self.plan.repeats, *x.shape[3:])

    def by_head(self, x: Tensor) -> Tensor:
        """[N, d, R M] -> [B, M, G, R, d], a view."""
        plan = self.plan
        spread = x.view(plan.batch, plan.groups, x.shape[1], plan.repeats, self.size)
        return spread.permute(0, 4, 1, 3, 2)

    def by_group(self, x: Tensor) -> Tensor:
        """[N, d, M] -> [B, M, G, d], a view."""
        return x.view(self.plan.batch, self.plan.groups, *x.shape[1:]).permute(0, 3, 1, 2)

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
        for index in range(len(state.blocks)):
            state.add(index, values, self.keys.expand(index).mT)  # [N, W, M] @ [N, M, D]


class Gradients:
    """Gradients of a chunk's q, k and v, in its layout, from `asked`: those of its sums of weights, [N, W, R M]."""

    def __init__(self, chunk: Chunk, room: Tensor) -> None:
        plan = chunk.plan
        self.chunk, self.plan = chunk, plan
        self.q, self.k, self.v = (torch.empty_like(x) for x in (chunk.q, chunk.k, chunk.v))
        self.asked, self.weights = torch.empty_like(chunk.total), torch.empty_like(chunk.scores)
        self.slope = torch.empty_like(chunk.scores)
        self.room = room

    @cached_property
    def queries(self) -> Puller:
        return Puller(self.chunk.queries, self.room, self.q)

    @cached_property
    def keys(self) -> Puller:
        return Puller(self.chunk.keys, self.room, self.k)

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
            slope.add(index, asked, phi.mT, block.weight)  # [N, W, R M] @ [N, R M, D]
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
