"""One chunk of all sequences and heads, forward and backward, in plain torch.

A chunk does three things: it attends within itself, its queries query the state before it, and its keys and values
update the state. `Chunk` holds the buffers for these, `ChunkGradients` those for their gradients, `Workspace` makes
each once.

Letters as in call.py, and M tokens of a chunk. Time is the last dim ([BG, d, M]; for queries [BG, d, R M], one head
after another), so that expanding phi writes whole rows, and each product takes contiguous operands. d is K padded to
whole tiles.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from powerplan.kernels.blocked_state import BlockedState
from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.state import divisor, vanishes
from powerplan.kernels.tiles import Expander, ExpanderBackward


class Chunk:
    """Buffers for a chunk of `size` tokens: queries, times the scale; keys; values, with a row of ones for the
    normaliser.

    q: [BG, d, R M]
    k: [BG, d, M]
    v: [BG, W, M]
    total: [BG, W, R M], sums of weighted values, and of weights in the last row; what the output is made of
    log_g_cumsum: [BG, M] float64, sums of the gates' logarithms since the chunk's start; None without gates. After
        1,000 gates of -100 a sum in float32 is off by 0.004, and so is the logarithm of every weight.
    """

    def __init__(self, shape: CallShape, size: int, phi_buffer: Tensor) -> None:
        self.shape, self.size, self.phi_buffer = shape, size, phi_buffer
        states, columns, queries = shape.state_count, shape.state_columns, shape.heads_per_kv_head * size
        self.q = phi_buffer.new_zeros(states, shape.padded_head_dim, queries)
        self.k = phi_buffer.new_zeros(states, shape.padded_head_dim, size)
        self.v = phi_buffer.new_ones(states, columns, size)
        self.total = phi_buffer.new_empty(states, columns, queries)
        self.scores = phi_buffer.new_empty(states, size, queries)
        self.causal_mask = phi_buffer.new_ones(size, size).triu()
        self.log_g_cumsum: Tensor | None = None

    # Made when they are first used: a sequence of one chunk never needs phi.
    @cached_property
    def phi_of_queries(self) -> Expander:
        return Expander(self.q, self.shape.tiling, self.phi_buffer)

    @cached_property
    def phi_of_keys(self) -> Expander:
        return Expander(self.k, self.shape.tiling, self.phi_buffer)

    def load(self, inputs: Inputs, tokens: slice, with_queries: bool = True) -> None:
        """Fill the buffers with these tokens of the inputs."""
        shape = self.shape
        if with_queries:
            self.by_head(self.q[:, : shape.head_dim]).copy_(self.split_heads(inputs.q[:, tokens]))
            self.q.mul_(shape.scale)
        self.by_kv_head(self.k[:, : shape.head_dim]).copy_(inputs.k[:, tokens])
        self.by_kv_head(self.v[:, : shape.v_head_dim]).copy_(inputs.v[:, tokens])
        if inputs.log_g is not None:
            # [B, M, G] -> [BG, M]
            log_g = inputs.log_g[:, tokens].transpose(1, 2).reshape(-1, self.size)
            self.log_g_cumsum = log_g.double().cumsum(-1)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, M, H, ...] -> [B, M, G, R, ...], a view."""
        return x.view(*x.shape[:2], self.shape.kv_heads, self.shape.heads_per_kv_head, *x.shape[3:])

    def by_head(self, x: Tensor) -> Tensor:
        """[BG, d, R M] -> [B, M, G, R, d], a view."""
        shape = self.shape
        split = x.view(shape.batch, shape.kv_heads, x.shape[1], shape.heads_per_kv_head, self.size)
        return split.permute(0, 4, 1, 3, 2)

    def by_kv_head(self, x: Tensor) -> Tensor:
        """[BG, d, M] -> [B, M, G, d], a view."""
        return x.view(self.shape.batch, self.shape.kv_heads, *x.shape[1:]).permute(0, 3, 1, 2)

    def split_queries(self, x: Tensor) -> Tensor:
        """[BG, M, R M] -> [BG, M, R, M], a view."""
        return x.view(-1, self.size, self.shape.heads_per_kv_head, self.size)

    def decay_since_start(self) -> Tensor | None:
        """exp(a) of the queries, [BG, 1, R M]: how much of the state before the chunk each of them still sees."""
        if self.log_g_cumsum is None:
            return None
        return self.log_g_cumsum.to(self.k.dtype).exp().repeat(1, self.shape.heads_per_kv_head)[:, None]

    def decay_to_end(self) -> Tensor | None:
        """exp(a_M - a) of the keys, [BG, 1, M]: how much of each is left in the state after the chunk."""
        if self.log_g_cumsum is None:
            return None
        return (self.log_g_cumsum[:, -1:] - self.log_g_cumsum).to(self.k.dtype).exp()[:, None]

    def decay_over_chunk(self) -> Tensor | None:
        """exp(a_M), [BG, 1, 1]: how much of the state before the chunk is left after it."""
        return None if self.log_g_cumsum is None else self.log_g_cumsum[:, -1:, None].to(self.k.dtype).exp()

    def decayed_values(self) -> Tensor:
        """v exp(a_M - a), [BG, W, M]: the values as the state after the chunk takes them in."""
        decay = self.decay_to_end()
        return self.v if decay is None else self.v * decay

    def masked_decay(self) -> Tensor:
        """The causal mask times exp(a_i - a_j), keys by queries, [1 or BG, M, 1, M]; never infinite."""
        if self.log_g_cumsum is None:
            return self.causal_mask[None, :, None]
        difference = self.k.new_empty(len(self.log_g_cumsum), self.size, self.size)
        torch.sub(self.log_g_cumsum[:, None, :], self.log_g_cumsum[:, :, None], out=difference)
        return difference.clamp_(max=0).exp_().mul_(self.causal_mask)[:, :, None]

    def query_state(self, state: BlockedState) -> None:
        """Put phi(q)^T S, times exp(a), into `total`."""
        total = self.total
        for index, (block, part) in enumerate(zip(self.shape.tiling.blocks, state.blocks, strict=True)):
            # [BG, W, D] @ [BG, D, R M]
            total.baddbmm_(part, self.phi_of_queries.expand(index), beta=min(index, 1), alpha=block.weight)
        decay = self.decay_since_start()
        if decay is not None:
            total.mul_(decay)

    def attend_within(self, add: bool) -> None:
        """Put the attention within the chunk into `total`, or add it to what is there."""
        torch.bmm(self.k.mT, self.q, out=self.scores)  # [BG, M, d] @ [BG, d, R M]
        self.split_queries(self.scores.pow_(self.shape.p)).mul_(self.masked_decay())
        self.total.baddbmm_(self.v, self.scores, beta=int(add))  # [BG, W, M] @ [BG, M, R M]

    def update_state(self, state: BlockedState) -> None:
        """Turn the state before the chunk into the state after it."""
        state.decay(self.decay_over_chunk())
        values = self.decayed_values()
        for index in range(len(state.blocks)):
            state.add(index, values, self.phi_of_keys.expand(index).mT)  # [BG, W, M] @ [BG, M, D]


class ChunkGradients:
    """Gradients of a chunk's q, k and v, in its layout, from `grad_total`, [BG, W, R M], that of its `total`."""

    def __init__(self, chunk: Chunk, phi_buffer: Tensor) -> None:
        self.chunk, self.shape, self.phi_buffer = chunk, chunk.shape, phi_buffer
        self.q, self.k, self.v = (torch.empty_like(x) for x in (chunk.q, chunk.k, chunk.v))
        self.grad_total, self.weights = torch.empty_like(chunk.total), torch.empty_like(chunk.scores)
        self.grad_scores = torch.empty_like(chunk.scores)

    @cached_property
    def through_phi_of_queries(self) -> ExpanderBackward:
        return ExpanderBackward(self.chunk.phi_of_queries, self.phi_buffer, self.q)

    @cached_property
    def through_phi_of_keys(self) -> ExpanderBackward:
        return ExpanderBackward(self.chunk.phi_of_keys, self.phi_buffer, self.k)

    def load(self, grad_out: Tensor, out: Tensor, norm: Tensor) -> None:
        """Fill `grad_total` from the gradient of the output, the output, and the sums of weights of these tokens."""
        chunk, grad_total = self.chunk, self.grad_total
        chunk.by_head(grad_total[:, : self.shape.v_head_dim]).copy_(chunk.split_heads(grad_out))
        if self.shape.normalize:
            # out = values / norm: the gradient of the sum of weights is -<grad, out> / norm.
            grad_norm = (grad_out.to(grad_total.dtype) * out).sum(-1).neg_().masked_fill_(vanishes(norm), 0)
            chunk.by_head(grad_total[:, -1:]).copy_(chunk.split_heads(grad_norm)[..., None])
            divisors = torch.empty_like(grad_total[:, :1])
            chunk.by_head(divisors).copy_(chunk.split_heads(divisor(norm))[..., None])
            grad_total.div_(divisors)

    def attend_within(self) -> None:
        """Put what comes from attention within the chunk into q, k and v."""
        chunk, p = self.chunk, self.shape.p
        scores, weights, grad_scores = chunk.scores, self.weights, self.grad_scores
        torch.bmm(chunk.k.mT, chunk.q, out=scores)  # [BG, M, d] @ [BG, d, R M]
        decay = chunk.masked_decay()
        # A weight is scores^p decay, and its derivative p scores^(p-1) decay: p is multiplied in at the end.
        if p == 1:
            chunk.split_queries(weights).copy_(decay)
        else:
            powers = chunk.split_queries(scores if p == 2 else scores.pow(p - 1))
            torch.mul(powers, decay, out=chunk.split_queries(weights))
        torch.bmm(chunk.v.mT, self.grad_total, out=grad_scores)  # [BG, M, W] @ [BG, W, R M]
        grad_scores.mul_(weights)
        weights.mul_(scores)
        torch.bmm(self.grad_total, weights.mT, out=self.v)  # [BG, W, R M] @ [BG, R M, M]
        self.q.baddbmm_(chunk.k, grad_scores, beta=0, alpha=p)  # [BG, d, M] @ [BG, M, R M]
        self.k.baddbmm_(chunk.q, grad_scores.mT, beta=0, alpha=p)  # [BG, d, R M] @ [BG, R M, M]

    def update_state(self, grad_state: BlockedState) -> None:
        """Add what comes from the state after the chunk, whose gradient is given, to k and v."""
        chunk = self.chunk
        values, decay = chunk.decayed_values(), chunk.decay_to_end()
        grad_values = self.v if decay is None else torch.zeros_like(self.v)
        for index, part in enumerate(grad_state.blocks):
            grad_values.baddbmm_(part, chunk.phi_of_keys.expand(index))  # [BG, W, D] @ [BG, D, M]
            torch.bmm(part.mT, values, out=self.through_phi_of_keys.rows[index])  # [BG, D, W] @ [BG, W, M]
            self.through_phi_of_keys.add(index)
        if decay is not None:
            self.v.addcmul_(grad_values, decay)

    def query_state(self, state: BlockedState, grad_state: BlockedState) -> None:
        """Add what comes from querying `state`, the one before the chunk, to q, and to the state's gradient."""
        chunk, decay = self.chunk, self.chunk.decay_since_start()
        grad_total = self.grad_total if decay is None else self.grad_total.mul_(decay)
        for index, (block, part) in enumerate(zip(self.shape.tiling.blocks, state.blocks, strict=True)):
            phi = chunk.phi_of_queries.expand(index)
            grad_state.add(index, grad_total, phi.mT, block.weight)  # [BG, W, R M] @ [BG, R M, D]
            # [BG, D, W] @ [BG, W, R M]
            self.through_phi_of_queries.rows[index].baddbmm_(part.mT, grad_total, beta=0, alpha=block.weight)
            self.through_phi_of_queries.add(index)

    def grad_log_g_cumsum(self) -> Tensor:
        """Return the gradient of a = cumsum(log_g), [B, M, G], without the final state's share."""
        chunk, shape = self.chunk, self.shape
        by_query = (chunk.q * self.q).sum(1).view(shape.state_count, shape.heads_per_kv_head, -1).sum(1)
        by_key = (chunk.k * self.k).sum(1)
        return (by_query - by_key).div_(shape.p).view(shape.batch, shape.kv_heads, -1).transpose(1, 2)


class Workspace:
    """All memory of a call: a Chunk, and its gradients, for each size that chunks have; the last may be shorter.

    All of them expand phi in one buffer, and take its gradient in a second one.
    """

    def __init__(self, shape: CallShape, like: Tensor) -> None:
        self.shape, self.like, self.phi_buffer = shape, like, _phi_buffer(shape, like)
        self.chunks: dict[int, Chunk] = {}
        self.grads: dict[int, ChunkGradients] = {}

    # Made when it is first used: a forward pass does not need it.
    @cached_property
    def grad_phi_buffer(self) -> Tensor:
        return _phi_buffer(self.shape, self.like)

    def chunk(self, tokens: slice) -> Chunk:
        """Return the buffers for a chunk of these tokens."""
        size = tokens.stop - tokens.start
        if size not in self.chunks:
            self.chunks[size] = Chunk(self.shape, size, self.phi_buffer)
        return self.chunks[size]

    def gradients(self, tokens: slice) -> ChunkGradients:
        """Return the buffers for the gradients of a chunk of these tokens."""
        size = tokens.stop - tokens.start
        if size not in self.grads:
            self.grads[size] = ChunkGradients(self.chunk(tokens), self.grad_phi_buffer)
        return self.grads[size]


def _phi_buffer(shape: CallShape, like: Tensor) -> Tensor:
    """Return memory for one block of phi of all queries of a chunk, flat."""
    rows = max(block.width for block in shape.tiling.blocks)
    return like.new_empty(shape.state_count * rows * shape.heads_per_kv_head * min(shape.chunk_size, shape.tokens))
