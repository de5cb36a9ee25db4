"""The tokens of all ranks on each of them: for latents that are smaller than heads, and for caches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from powerplan.kernels.distributed.agreement import explained
from powerplan.kernels.distributed.exchange import all_gather
from powerplan.kernels.distributed.layout import Layout, Range
from powerplan.kernels.distributed.plan import ContextParallel


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gather_tokens(plan: ContextParallel, x: Tensor, first: int = 0) -> Tensor:
    """Return the tokens of all ranks, in their order, on every rank; gradients go back to the rank that has the token.

    Every rank must make the call, and go backward through it, where it has no tokens too. The gradient of a token is
    the sum over ranks.

    Args:
        plan: Which rank has which tokens.
        x: [B, t, ...], this rank's tokens.
        first: The first token that is wanted, of those of all ranks.

    Returns:
        [B, T - first, ...].
    """
    gathered: Tensor = _Gather.apply(plan, x, first)  # type: ignore[no-untyped-call]
    return gathered


def gathered(plan: ContextParallel, own: Tensor, first: int = 0) -> Tensor:
    """Return the same of tensors whose first dim is time, [t, ...] -> [T - first, ...], without gradients."""
    parts = [_later(plan.layout, rank, first) for rank in range(plan.ranks)]
    counts = [sum(stop - start for start, stop, _ in each) for each in parts]
    padded = own.new_zeros(max(counts), *own.shape[1:])
    at = 0
    for start, stop, _ in parts[plan.rank]:
        padded[at : at + stop - start] = own[start:stop]
        at += stop - start
    arrived = padded.new_empty(plan.ranks * max(counts), *own.shape[1:])
    with explained(plan.rank, plan.ranks):
        all_gather(arrived, padded, plan.group)
    whole = own.new_empty(plan.layout.tokens - first, *own.shape[1:])
    for rank, each in enumerate(parts):
        at = rank * max(counts)
        for start, stop, place in each:
            whole[place : place + stop - start] = arrived[at : at + stop - start]
            at += stop - start
    return whole


def _later(layout: Layout, rank: int, first: int) -> list[tuple[int, int, int]]:
    """Return which tokens of a rank are `first` or later: ranges of its own, and their places among all such tokens."""
    found, at = [], 0
    own: tuple[Range, ...] = layout.ranges[rank]
    for start, stop in own:
        skipped = min(max(first - start, 0), stop - start)
        if stop - start > skipped:
            found.append((at + skipped, at + stop - start, start + skipped - first))
        at += stop - start
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: ContextParallel, x: Tensor, first: int) -> Tensor:
        ctx.plan, ctx.first, ctx.size = plan, first, x.shape
        return gathered(plan, x.transpose(0, 1), first).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        plan, grad = ctx.plan, grad.transpose(0, 1)
        parts = [_later(plan.layout, rank, ctx.first) for rank in range(plan.ranks)]
        sent = torch.cat([grad[place : place + stop - start] for each in parts for start, stop, place in each])
        counts = [sum(stop - start for start, stop, _ in each) for each in parts]
        arrived = grad.new_empty(plan.ranks * counts[plan.rank], *grad.shape[1:])
        with explained(plan.rank, plan.ranks):
            dist.all_to_all_single(arrived, sent, [counts[plan.rank]] * plan.ranks, counts, group=plan.group)
        rows = arrived.view(plan.ranks, counts[plan.rank], *grad.shape[1:]).sum(0)
        own = grad.new_zeros(ctx.size[1], *grad.shape[1:])
        at = 0
        for start, stop, _ in parts[plan.rank]:
            own[start:stop] = rows[at : at + stop - start]
            at += stop - start
        return None, own.transpose(0, 1), None
