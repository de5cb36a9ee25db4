"""The exchange as nodes of autograd: states are handed on forward, and their gradients back.

`Begin` and `End` are the two ends of it. Nothing but their order ties them, so that what autograd does between them
overlaps with the exchange. Every rank has the same nodes in its graph, whatever it holds: the backward exchange needs
all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from powerplan.kernels.distributed.agreement import explained
from powerplan.kernels.distributed.exchange import Scan
from powerplan.kernels.distributed.plan import ContextParallel
from powerplan.kernels.distributed.transition import gradient


class Passage:
    """One exchange: its scan forward while that is under way, and its scan backward."""

    def __init__(self, plan: ContextParallel) -> None:
        self.plan = plan
        self.forward: Scan | None = None
        self.backward: tuple[Scan, Tensor] | None = None


class Begin(torch.autograd.Function):
    """Send states; backward, receive their gradients. Returns a number that `End` takes, to be its successor."""

    @staticmethod
    def forward(
        ctx: Any,
        passage: Passage,
        values: Tensor,
        transitions: Tensor | None,
        used: list[bool],
        *anchors: Tensor | None,
    ) -> Tensor:
        passage.forward = Scan(passage.plan.wire, values, transitions, reverse=False)
        ctx.passage = passage
        # Where this rank has a use for an anchor, other paths bring its gradient.
        ctx.anchors = [
            None if x is None or elsewhere else (x.shape, x.dtype, x.device)
            for x, elsewhere in zip(anchors, used, strict=True)
        ]
        ctx.transitions = None if transitions is None else transitions.shape
        return values.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        scan, entries = ctx.passage.backward
        ctx.passage.backward = None
        grads = scan.finish()
        grad_transitions = None
        if ctx.transitions is not None:
            # The transition over a fragment multiplies the state before it, and the result is the state after it.
            layout, rank = ctx.passage.plan.layout, ctx.passage.plan.rank
            own = layout.of_rank(rank)
            grad_transitions = grads.new_zeros(ctx.transitions)
            into, out_of = layout.receivers(rank, False), layout.senders(rank, False)
            for place, index in enumerate(own):
                if layout.fragments[index].passes_through:
                    pair = entries[into.index(index)], grads[out_of.index(index)]
                    grad_transitions[place] = gradient(ctx.transitions[1:], *pair)
        # An anchor is there to be a path to this node.
        zeros = [None if x is None else torch.zeros(x[0], dtype=x[1], device=x[2]) for x in ctx.anchors]
        return None, grads, grad_transitions, None, *zeros


class End(torch.autograd.Function):
    """Receive the states before the fragments of this rank; backward, send their gradients."""

    @staticmethod
    def forward(ctx: Any, passage: Passage, token: Tensor, transitions: Tensor | None) -> Tensor:
        assert passage.forward is not None, "an exchange is used once"
        entries = passage.forward.finish()
        passage.forward = None
        ctx.passage = passage
        ctx.save_for_backward(entries, transitions)
        return entries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_entries: Tensor) -> Any:
        entries, transitions = ctx.saved_tensors
        scan = Scan(ctx.passage.plan.wire, grad_entries.contiguous(), transitions, reverse=True)
        ctx.passage.backward = scan, entries
        return None, grad_entries.new_zeros(()), None


class Join(torch.autograd.Function):
    """Ties the output to the exchange, on ranks that received nothing too; sums final states over all ranks.

    Each final state comes from the one rank that has its sequence's last token. Its gradient is the sum of those of all
    ranks, each of which has it.
    """

    @staticmethod
    def forward(ctx: Any, plan: ContextParallel, out: Tensor, entries: Tensor, finals: Tensor | None) -> Any:
        ctx.plan, ctx.entries = plan, entries.shape
        ctx.final_size = None if finals is None else finals.shape
        ctx.set_materialize_grads(False)
        ctx.like = out.shape, out.dtype, out.device
        ctx.high = entries.dtype
        if finals is not None:
            finals = finals.clone(memory_format=torch.contiguous_format)
            with explained(plan.rank, plan.ranks):
                dist.all_reduce(finals, group=plan.group)
        return out.view_as(out), finals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_finals: Tensor | None) -> Any:
        shape, dtype, device = ctx.like
        if grad_out is None:
            grad_out = torch.zeros(shape, dtype=dtype, device=device)
        grads = None
        if ctx.final_size is not None:
            grads = torch.zeros(ctx.final_size, dtype=ctx.high, device=device)
            if grad_finals is not None:
                grads.copy_(grad_finals)
            with explained(ctx.plan.rank, ctx.plan.ranks):
                dist.all_reduce(grads, group=ctx.plan.group)
        # Where states came in, it is the attention to them that leads back to the exchange.
        entries = None if ctx.entries[0] else torch.zeros(ctx.entries, dtype=ctx.high, device=device)
        return None, grad_out, entries, grads
