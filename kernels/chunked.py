"""Power attention in chunks, in plain torch, for any device: attention within a chunk, a state between chunks.

The four stages of arXiv 2507.04239, Appendix F, in one loop over chunks, forward and backward. phi exists one block at
a time, in one buffer; all buffers are made once for a call, and all views of them, so that the forward pass takes no
more memory for a longer context. Training keeps a state for every EVERY chunks, and recomputes that many at a time on
the way back. The letters are those of plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from powerplan.kernels.chunk import Desk
from powerplan.kernels.plan import EVERY, TILE, Plan, State
from powerplan.kernels.state import divisor

__all__ = ["EVERY", "TILE", "Plan", "backward", "forward"]


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
    running, desk = State.of(plan, state, work), Desk(plan, work)
    chunks = plan.chunks()
    first = int(state is None)
    pieces = -(-len(chunks) // EVERY) - first if keep else 0
    kept = work.new_empty(pieces, plan.count, plan.layout.dim, plan.columns)
    for index, at in enumerate(chunks):
        if keep and index % EVERY == 0 and running.seen:
            kept[index // EVERY - first].view(-1).copy_(running.flat)
        chunk = desk.chunk(at)
        chunk.load(at, q, k, v, log_g)
        if running.seen:
            with record_function("power: query state"):
                chunk.ask(running)
        with record_function("power: within chunk"):
            chunk.attend(running.seen)
        if want_state or index < len(chunks) - 1:
            with record_function("power: update state"):
                chunk.update(running)
        total = chunk.total
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
    if not, its gradient is an empty tensor.

    The gate's gradient needs no pass of its own: every weight is homogeneous of degree p in its query and in its key,
    so dL/da_i = (q_i.dq_i - k_i.dk_i) / p, plus <dS, S> at the last token; dL/dlog_g is its reverse cumulative sum.
    """
    work = _work(q)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    towards = work.new_empty(plan.batch, plan.tokens, plan.groups) if log_g is not None else None
    slope, desk = State.of(plan, grad_state, work), Desk(plan, work)
    for at, before in _states_backwards(k, v, log_g, kept, desk, plan, with_state):
        chunk, grads = desk.chunk(at), desk.gradients(at)
        chunk.load(at, q, k, v, log_g)
        grads.load(at, grad_out, out, norm)
        with record_function("power: within chunk, backward"):
            grads.attend()
        if slope.seen:
            with record_function("power: update state, backward"):
                grads.update(slope)
        slope.decay(chunk.over_all())
        if before.seen:
            with record_function("power: query state, backward"):
                grads.ask(before, slope)
        if towards is not None:
            towards[:, at] = grads.of_decay()
        chunk.split(grad_q[:, at]).copy_(chunk.by_head(grads.q.mul_(plan.scale)[:, : plan.key_dim]))
        grad_k[:, at] = chunk.by_group(grads.k[:, : plan.key_dim])
        grad_v[:, at] = chunk.by_group(grads.v[:, : plan.value_dim])
    if towards is not None and reach is not None:
        towards[:, -1] += reach
    grad_g = None if towards is None else towards.flip(1).cumsum(1).flip(1)
    return grad_q, grad_k, grad_v, grad_g, slope.whole() if with_state else work


def _states_backwards(
    k: Tensor, v: Tensor, log_g: Tensor | None, kept: Tensor, desk: Desk, plan: Plan, with_state: bool
) -> Iterator[tuple[slice, State]]:
    """Yield the chunks from the last to the first, each with the state before it, recomputed between those kept."""
    chunks = plan.chunks()
    for segment in reversed(range(-(-len(chunks) // EVERY))):
        part = chunks[segment * EVERY : (segment + 1) * EVERY]
        first = segment == 0 and not with_state
        states = [State.of(plan, None, desk.like) if first else State(plan, kept[segment - int(not with_state)])]
        for at in part[:-1]:
            chunk = desk.chunk(at)
            chunk.load(at, None, k, v, log_g)
            state = states[-1].copy()
            with record_function("power: update state, again"):
                chunk.update(state)
            states.append(state)
        while states:
            yield part[len(states) - 1], states.pop()
