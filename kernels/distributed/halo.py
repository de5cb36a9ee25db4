"""The tokens before a rank's fragments, from the ranks that have them: for windows, short convolutions, token shifts.

A mixer that sees the last n tokens needs n tokens of each fragment's sequence from before the fragment. They may lie in
one earlier fragment or, where those are shorter, in several; a sequence that begins within them has fewer. One
all-to-all with counts of its own for each pair of ranks brings them, and another one takes their gradients back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from powerplan.kernels import api
from powerplan.kernels.checks import check_count
from powerplan.kernels.distributed.agreement import explained
from powerplan.kernels.distributed.arguments import check_derivatives, check_tokens
from powerplan.kernels.distributed.layout import Layout
from powerplan.kernels.distributed.plan import ContextParallel

Part = tuple[int, int, int]
"""Tokens that lie together on one rank: the rank, and the first and the one behind the last of its own tokens."""


@dataclass(frozen=True)
class Halo:
    """Which tokens stand before the fragments of a rank, and which of its own tokens stand before those of others.

    Attributes:
        layout: Who holds which tokens.
        rank: The rank that this is about.
        tokens: n, how many tokens before its own a token sees.
    """

    layout: Layout
    rank: int
    tokens: int

    @cached_property
    def parts(self) -> list[list[list[Part]]]:
        """For each rank, for each of its fragments in its own order: where the tokens before it lie, in their order."""
        return [[self._before(index) for index in self.layout.of_rank(rank)] for rank in range(self.layout.ranks)]

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens each fragment of this rank gets, in the rank's own order: n, or all that its sequence has."""
        return [sum(stop - start for _, start, stop in parts) for parts in self.parts[self.rank]]

    @cached_property
    def wanted(self) -> list[Part]:
        """Where the tokens lie that this rank gets, for one fragment after another; some may be its own."""
        return [part for parts in self.parts[self.rank] for part in parts]

    @cached_property
    def given(self) -> list[list[tuple[int, int]]]:
        """For each rank, which of this rank's tokens it gets from here; itself gets none over the wire."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.layout.ranks)]
        for rank, fragments in enumerate(self.parts):
            if rank != self.rank:
                found[rank] = [
                    (start, stop) for parts in fragments for owner, start, stop in parts if owner == self.rank
                ]
        return found

    @cached_property
    def sent(self) -> list[int]:
        """How many tokens of each row this rank sends to each rank, forward; backward it gets their gradients."""
        return [sum(stop - start for start, stop in ranges) for ranges in self.given]

    @cached_property
    def received(self) -> list[int]:
        """How many tokens of each row this rank gets from each rank, forward; backward it sends their gradients."""
        counts = [0] * self.layout.ranks
        for owner, start, stop in self.wanted:
            if owner != self.rank:
                counts[owner] += stop - start
        return counts

    @cached_property
    def all_tokens(self) -> int:
        """How many tokens of each row ranks send each other, all together."""
        parts = ((rank, part) for rank, own in enumerate(self.parts) for parts in own for part in parts)
        return sum(stop - start for rank, (owner, start, stop) in parts if owner != rank)

    def sent_bytes(self, features: int, itemsize: int, *, batch: int = 1, backward: bool = False) -> int:
        """Return the bytes that this rank hands to torch.distributed in one exchange: tokens x features x their size.

        Where every rank has at least n tokens of one sequence side by side, that is n tokens for each fragment that its
        sequence goes on after: independent of the context.

        Args:
            features: Numbers of a token in all tensors together, as G (K + V) for keys and values.
            itemsize: Bytes of a number.
            batch: B, rows of the batch.
            backward: Whether to count the backward pass instead of the forward pass.

        Raises:
            ValueError: A count is not an integer of at least 1.
        """
        for name, value in (("features", features), ("itemsize", itemsize), ("batch", batch)):
            check_count(name, value)
        return sum(self.received if backward else self.sent) * batch * features * itemsize

    def _before(self, index: int) -> list[Part]:
        fragments = self.layout.fragments
        fragment = fragments[index]
        first = max(self.layout.bounds[fragment.pieces[0].sequence], fragment.start - self.tokens)
        found = []
        while fragment.start > first:
            index -= 1
            other = fragments[index]
            start = max(first, other.start)
            found.append((other.rank, other.first + start - other.start, other.first + other.stop - other.start))
            fragment = other
        return found[::-1]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tokens_before(plan: ContextParallel, tokens: int, *tensors: Tensor) -> tuple[Halo, list[Tensor], list[Tensor]]:
    """Return the last tokens before each of this rank's fragments, in their sequences; gradients go back to them.

    Every rank must make the call, and go backward through it, where it has no tokens too. The tensors that come back
    are to be used in place of those given: by them the backward pass of every rank finds the exchange, whether the rank
    got any tokens or not.

    Args:
        plan: Which rank has which tokens.
        tokens: n, how many tokens before each fragment are wanted. A sequence that has fewer gives those.
        *tensors: [B, t, ...] each, with this rank's tokens; of one dtype and batch size.

    Returns:
        The Halo, whose `lengths` say how many tokens each fragment of `plan.fragments` gets; the tensors; and for each
        of them the tokens before, [B, sum of lengths, ...], one fragment after another.

    Raises:
        ValueError: The number of tokens is below 0; a tensor has not this rank's tokens; or ranks differ in what they
            give, on all ranks where the plan checks.
    """
    if not tensors:
        raise ValueError("tensors: none are given")
    check_derivatives(*tensors)
    with plan.agreement.of_errors("the halos"):
        check_count("tokens", tokens, 0)
        check_tokens(plan, **{f"tensors[{place}]": x for place, x in enumerate(tensors)})
        for name in ("dtype", "device"):
            found = sorted({str(getattr(x, name)) for x in tensors})
            if len(found) > 1:
                raise ValueError(f"tensors must have one {name}, and have {' and '.join(found)}")
        rows = sorted({x.shape[0] for x in tensors})
        if len(rows) > 1:
            raise ValueError(f"tensors must have as many rows, and have {' and '.join(map(str, rows))}")
    plan.agreement.on(
        "the halos",
        {
            "tokens before": tokens,
            "rows": rows[0],
            "features": [tuple(x.shape[2:]) for x in tensors],
            "dtype": str(tensors[0].dtype),
            "gradients (recorded or not)": api.requires_gradient(*tensors),
        },
    )
    halo = plan.halo(tokens)
    made: tuple[Tensor, ...] = _Exchange.apply(plan, halo, *tensors)  # type: ignore[no-untyped-call]
    return halo, list(made[: len(tensors)]), list(made[len(tensors) :])


class _Exchange(torch.autograd.Function):
    """[B, t, ...] each -> the same, and the tokens before this rank's fragments."""

    @staticmethod
    def forward(ctx: Any, plan: ContextParallel, halo: Halo, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.halo = plan, halo
        sent = [_rows(tensors, start, stop) for ranges in halo.given for start, stop in ranges]
        arrived = _all_to_all(plan, halo, _joined(sent, tensors), backward=False)
        taken = list(accumulate(halo.received, initial=0))
        rows = []
        for owner, start, stop in halo.wanted:
            if owner == plan.rank:
                rows.append(_rows(tensors, start, stop))
            else:
                rows.append(arrived[taken[owner] : taken[owner] + stop - start])
                taken[owner] += stop - start
        return *(x.view_as(x) for x in tensors), *_tensors(_joined(rows, tensors), tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan, halo = ctx.plan, ctx.halo
        count = len(grads) // 2
        # Gradients of its own tokens may be those of other nodes, too: they are not to be written to.
        own, before = [grad.clone() for grad in grads[:count]], grads[count:]
        sent: list[list[Tensor]] = [[] for _ in range(plan.ranks)]
        at = 0
        for owner, start, stop in halo.wanted:
            rows = _rows(before, at, at + stop - start)
            at += stop - start
            if owner == plan.rank:
                _add(own, start, stop, rows)
            else:
                sent[owner].append(rows)
        arrived = _all_to_all(plan, halo, _joined([rows for each in sent for rows in each], before), backward=True)
        at = 0
        for start, stop in (one for ranges in halo.given for one in ranges):
            _add(own, start, stop, arrived[at : at + stop - start])
            at += stop - start
        return None, None, *own


def _all_to_all(plan: ContextParallel, halo: Halo, sent: Tensor, *, backward: bool) -> Tensor:
    give, get = (halo.received, halo.sent) if backward else (halo.sent, halo.received)
    arrived = sent.new_empty(sum(get), sent.shape[1])
    if halo.all_tokens:  # the same on all ranks, so that all make the exchange or none
        with explained(plan.rank, plan.ranks):
            dist.all_to_all_single(arrived, sent, get, give, group=plan.group)
    return arrived


def _rows(tensors: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
    """Return these tokens of all tensors [B, t, ...] side by side, [tokens, B x features]."""
    return torch.cat([x[:, start:stop].transpose(0, 1).flatten(1) for x in tensors], 1)


def _joined(rows: list[Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
    """Return rows one after another, of the tensors' width where there are none."""
    return torch.cat(rows) if rows else _rows(tensors, 0, 0)


def _tensors(rows: Tensor, like: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the tokens of rows [tokens, B x features] as tensors [B, tokens, ...]: `_rows` undone."""
    sizes = [(x.shape[0], *x.shape[2:]) for x in like]
    parts = torch.split(rows, [torch.Size(size).numel() for size in sizes], 1)
    return [part.reshape(len(rows), *size).transpose(0, 1) for part, size in zip(parts, sizes, strict=True)]


def _add(tensors: list[Tensor], start: int, stop: int, rows: Tensor) -> None:
    """Add rows [tokens, B x features] to these tokens of the tensors [B, t, ...], in place."""
    for x, part in zip(tensors, _tensors(rows, tuple(tensors)), strict=True):
        x[:, start:stop] += part
