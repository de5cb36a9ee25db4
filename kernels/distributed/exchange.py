"""Hands states over between fragments: an exclusive scan with transitions, on torch.distributed.

Forward, fragment f has the state S_f that it leaves behind and the transition A_f over it, and wants the state before
it: H_f+1 = A_f H_f + S_f (transition.py). Backward, it has the gradient g_f of H_f, and wants that of its S_f:
L_f = g_f+1 + A_f+1^T L_f+1, the same scan from the other end.

Two ways to do it. "gather": every rank gets all states in one collective, and sums those that it needs. "scan": states
are sent from fragment to fragment, in rounds. In the first, each fragment gets the sum of the one before it; in each
later round the sum of twice as many (Hillis and Steele 1986). A message is a state and, where there are transitions,
that over the fragments that it sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from powerplan.kernels.distributed.agreement import explained
from powerplan.kernels.distributed.layout import Layout
from powerplan.kernels.distributed.transition import after, applied, is_matrix, transposed


@dataclass(frozen=True)
class Wire:
    """How states travel between the ranks of a group.

    Attributes:
        group: The process group.
        rank: This rank in it.
        layout: Who holds which fragment.
        way: "gather" or "scan".
        dtype: The dtype of states and matrices on the wire; None for their own. Decays always travel in their own.
    """

    group: dist.ProcessGroup
    rank: int
    layout: Layout
    way: str
    dtype: torch.dtype | None

    def width(self, reverse: bool) -> int:
        """Return how many states each rank gives to a gather: as many as the rank that has most of them."""
        return self._widths[reverse]

    # Cached, as plans are used for many calls: with a thousand ranks these take milliseconds.
    @cached_property
    def _widths(self) -> list[int]:
        ranks = range(self.layout.ranks)
        return [max(len(self.layout.senders(rank, reverse)) for rank in ranks) for reverse in (False, True)]

    @cached_property
    def own_rounds(self) -> list[list[list[tuple[int, int]]]]:
        """The messages of each round of a scan, forward and in reverse, that this rank sends or gets."""
        fragments = self.layout.fragments
        return [
            [[pair for pair in pairs if self.rank in [fragments[index].rank for index in pair]] for pairs in rounds]
            for rounds in (self.rounds(False), self.rounds(True))
        ]

    def rounds(self, reverse: bool) -> list[list[tuple[int, int]]]:
        """Return the messages of each round of a scan: pairs of the fragment that sends, and the one that gets it."""
        layout, step = self.layout, -1 if reverse else 1
        fragments = range(len(layout.fragments))
        distances = [layout.distance(index, reverse) for index in fragments]
        found = [[(index - step, index) for index in fragments if distances[index]]]
        reach = 1
        while reach < layout.longest:
            found.append([(index - step * reach, index) for index in fragments if distances[index] > reach])
            reach *= 2
        return [sorted(pairs) for pairs in found]

    def messages(self, reverse: bool) -> int:
        """Return how many states this rank hands over in one scan, those of a gather that stand for none included."""
        if not self.layout.longest:
            return 0
        if self.way == "gather":
            return self.width(reverse)
        fragments = self.layout.fragments
        pairs = [pair for pairs in self.own_rounds[reverse] for pair in pairs]
        owners = [(fragments[source].rank, fragments[target].rank) for source, target in pairs]
        return sum(source == self.rank != target for source, target in owners)

    def message_bytes(
        self,
        size: tuple[int, int, int, int],
        gated: bool,
        high: torch.dtype,
        transition: tuple[int, int] = (1, 1),
    ) -> int:
        """Return the bytes of one message: states of `size` [B, G, D, W] in the dtype `high`, and their transitions.

        gated: whether there are transitions. transition: the size of that of a head: (1, 1), (D, 1) or (D, D).
        """
        batch, groups, dim, columns = size
        wire = self.dtype or high
        each = wire if transition[1] > 1 else high
        beside = prod(transition) * each.itemsize if gated else 0
        return batch * groups * (dim * columns * wire.itemsize + beside)


def all_gather(output: Tensor, own: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    """Gather `own` of all ranks in `output`, one after another. Returns what to wait for, with `async_op`."""
    gather = getattr(dist, "all_gather_single", None)  # the name of all_gather_into_tensor from torch 2.13 on
    return (gather or dist.all_gather_into_tensor)(output, own, group=group, async_op=async_op)


class Scan:
    """An exclusive scan that is under way: started by its constructor, ended by `finish`."""

    def __init__(self, wire: Wire, values: Tensor, transitions: Tensor | None, reverse: bool) -> None:
        """Start.

        Args:
            wire: How states travel.
            values: [senders, B, G, D, W], what the fragments of this rank have for others, as Layout.senders has them.
            transitions: [fragments, B, G, 1, 1], [fragments, B, G, D, 1] or [fragments, B, G, D, D], those over the
                fragments of this rank; None where all are 1.
            reverse: Whether sums run from the last fragment to the first.
        """
        self.wire, self.reverse, self.size = wire, reverse, values.shape[1:]
        self.values = values
        layout = wire.layout
        self.senders, self.receivers = (at(wire.rank, reverse) for at in (layout.senders, layout.receivers))
        own = layout.of_rank(wire.rank)
        self.transitions: dict[int, Tensor] | None = None
        self.transition_size = torch.Size()
        if transitions is not None:
            transitions = transposed(transitions) if reverse else transitions
            self.transition_size = transitions.shape[1:]
            self.transitions = {index: transitions[place] for place, index in enumerate(own)}
        self.work: Any = None
        if not layout.longest:
            return
        with explained(wire.rank, wire.layout.ranks):
            if wire.way == "gather":
                self._start_gather()
            else:
                self._start_rounds()

    def finish(self) -> Tensor:
        """Wait for the others, and return what they have for the fragments of this rank, [receivers, B, G, D, W]."""
        if not self.receivers and self.work is None:
            return self.values.new_empty(0, *self.size)
        with explained(self.wire.rank, self.wire.layout.ranks):
            sums = self._finish_gather() if self.wire.way == "gather" else self._finish_rounds()
        return torch.stack(sums) if sums else self.values.new_empty(0, *self.size)

    def _own(self, index: int) -> Tensor | None:
        return None if self.transitions is None else self.transitions[index]

    def _packed(self, value: Tensor, transition: Tensor | None, out: Tensor) -> None:
        """Write a state [B, G, D, W] and its transition to a message, [numbers] in the dtype of the wire."""
        count = value.numel()
        out[:count].view(value.shape).copy_(value)
        if transition is None:
            return
        if is_matrix(transition):
            out[count:].view(transition.shape).copy_(transition)
        else:
            out[count:].copy_(transition.contiguous().flatten().view(out.dtype))

    def _unpacked(self, message: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the state [B, G, D, W] of a message, and its transition where there are any."""
        count, dtype = self.size.numel(), self.values.dtype
        value = message[:count].view(self.size).to(dtype)
        if self.transitions is None:
            return value, None
        if self.transition_size[-1] > 1:
            return value, message[count:].view(self.transition_size).to(dtype)
        # A number may only be read where its own size divides its place, and the state before it may end anywhere.
        return value, message[count:].clone().view(dtype).view(self.transition_size)

    def _new_messages(self, count: int) -> Tensor:
        high = self.values.dtype
        dtype = self.wire.dtype or high
        numbers = self.size.numel()
        if self.transitions is not None:
            beside = self.transition_size.numel()
            numbers += beside if self.transition_size[-1] > 1 else beside * high.itemsize // dtype.itemsize
        return self.values.new_empty(count, numbers, dtype=dtype)

    def _start_gather(self) -> None:
        width, ranks = self.wire.width(self.reverse), self.wire.layout.ranks
        own = self._new_messages(width)
        for place, index in enumerate(self.senders):
            self._packed(self.values[place], self._own(index), own[place])
        own[len(self.senders) :] = 0
        self.messages = self._new_messages(ranks * width)
        self.own = own  # kept until it is sent
        self.work = all_gather(self.messages, own, self.wire.group, async_op=True)

    def _finish_gather(self) -> list[Tensor]:
        self.work.wait()
        layout, width = self.wire.layout, self.wire.width(self.reverse)
        place = {
            index: rank * width + number
            for rank in range(layout.ranks)
            for number, index in enumerate(layout.senders(rank, self.reverse))
        }
        step = -1 if self.reverse else 1
        sums = []
        for index in self.receivers:
            total: Tensor | None = None
            for distance in range(layout.distance(index, self.reverse), 0, -1):
                value, transition = self._unpacked(self.messages[place[index - step * distance]])
                total = value.clone() if total is None else after(transition, total, value)
            assert total is not None, "a receiver has fragments before it"
            sums.append(total)
        return sums

    def _start_rounds(self) -> None:
        self.rounds = self.wire.own_rounds[self.reverse]
        # What a fragment of this rank has to hand on: its own state at first, then the sum of those before it.
        self.at_hand = {index: (self.values[place], self._own(index)) for place, index in enumerate(self.senders)}
        self.work, self.arriving = self._exchange(self.rounds[0])

    def _finish_rounds(self) -> list[Tensor]:
        sums: dict[int, tuple[Tensor, Tensor | None]] = {}
        for number in range(len(self.rounds)):
            for work in self.work:
                work.wait()
            for index, message in self.arriving.items():
                value, transition = self._unpacked(message) if isinstance(message, Tensor) else message
                if number:
                    newer, newer_transition = sums[index]
                    value = after(newer_transition, value, newer)
                    if transition is not None and newer_transition is not None:
                        transition = applied(newer_transition, transition)
                sums[index] = value, transition
            if number + 1 < len(self.rounds):
                self.at_hand = sums
                self.work, self.arriving = self._exchange(self.rounds[number + 1])
        return [sums[index][0] for index in self.receivers]

    def _exchange(self, pairs: list[tuple[int, int]]) -> tuple[list[Any], dict[int, Any]]:
        """Send and ask for the messages of a round. Returns what to wait for, and what arrives at which fragment."""
        wire, fragments = self.wire, self.wire.layout.fragments
        operations, arriving = [], {}
        self.sent: list[Tensor] = []  # kept until the next round
        for source, target in pairs:
            sender, getter = fragments[source].rank, fragments[target].rank
            if sender == getter == wire.rank:
                arriving[target] = self.at_hand[source]
                continue
            (message,) = self._new_messages(1)
            if sender == wire.rank:
                self._packed(*self.at_hand[source], message)
                self.sent.append(message)
                operations.append(self._operation(dist.isend, message, getter))
            else:
                arriving[target] = message
                operations.append(self._operation(dist.irecv, message, sender))
        return dist.batch_isend_irecv(operations) if operations else [], arriving

    def _operation(self, kind: Any, message: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(kind, message, dist.get_global_rank(self.wire.group, rank), self.wire.group)
