"""Training runs over documents of many lengths: the layout that is fastest with the time that devices wait in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from powerplan.lengths.flops import DocumentRow
from powerplan.run.layouts import Layout, Layouts
from powerplan.run.search import SLOWER, Found, simplest_of_fastest
from powerplan.run.waiting import DocumentOrder, Waiting

LEAST_COMPARED = 61
"""Layouts whose waiting is found at least: other mixers are tried in the best and 60 others."""


@dataclass(frozen=True)
class DocumentSplit:
    """A layout whose sequences of documents are split over the devices in one way. waiting_s: seconds of its step in
    which devices wait for longer documents, which its step has."""

    layout: Layout
    waiting_s: float = 0.0


@dataclass(frozen=True)
class DocumentPlan:
    """A phase of a run over documents, each way to split them in its own best layout.

    row: the FLOPs of the documents. waiting: how much longer the slowest devices of the plan work than the mean.
    come: sequences as they come, the plan. ordered: sequences sorted by their work, and documents shared evenly by the
    devices of cp. even: as if no device waited. find_unmasked: finds the best layout where every token attends to all
    before it in its sequence; InputError where there is none.
    """

    row: DocumentRow
    waiting: Waiting
    come: DocumentSplit
    ordered: DocumentSplit
    even: DocumentSplit
    find_unmasked: Callable[[], Layout]

    @cached_property
    def unmasked(self) -> DocumentSplit:
        """The best layout of the same phase without masks, which takes a search of its own."""
        return DocumentSplit(self.find_unmasked())


def with_documents(layouts: Layouts, found: Found, find_unmasked: Callable[[], Layout]) -> tuple[Found, DocumentPlan]:
    """Return layouts with the time that devices wait for longer documents, which come in any order, the best first.

    Waiting can only slow a layout down, so that those are compared which are faster without it than the best is with
    it. Where no layout fits, the one that is nearest to fitting stays.
    """
    lengths = layouts.setting.lengths
    assert lengths is not None
    order = DocumentOrder(layouts.accounting, lengths, layouts.context, layouts.setting.efficiency)
    ranked = [found.best]
    if found.best.fits:
        ranked = sorted((found.best, *found.others), key=lambda layout: -layout.tokens_per_s)

    def come(layout: Layout) -> float:
        waiting = order.waiting(layout)
        return seconds_waited(layout, waiting.come, waiting.come_longest)

    def ordered(layout: Layout) -> float:
        waiting = order.waiting(layout)
        return seconds_waited(layout, waiting.sorted, waiting.sorted_longest)

    best, *others = _slowed(ranked, come)
    plan = DocumentPlan(
        layouts.documents,
        order.waiting(best.layout),
        best,
        _slowed(ranked, ordered)[0],
        DocumentSplit(found.best),
        find_unmasked,
    )
    return replace(found, best=best.layout, others=tuple(split.layout for split in others)), plan


def _slowed(ranked: Sequence[Layout], waited: Callable[[Layout], float]) -> list[DocumentSplit]:
    """Return layouts with what devices wait in them, the best first; `ranked` without it, from the fastest on."""
    slowed: list[DocumentSplit] = []
    fastest = 0.0
    for number, layout in enumerate(ranked):
        if number >= LEAST_COMPARED and layout.tokens_per_s * SLOWER < fastest:
            break
        waiting_s = waited(layout)
        slower = replace(layout, step=replace(layout.step, waiting_s=waiting_s))
        slowed.append(DocumentSplit(slower, waiting_s))
        fastest = max(fastest, slower.tokens_per_s)
    best = simplest_of_fastest([split.layout for split in slowed])
    return sorted(slowed, key=lambda split: (split.layout is not best, -split.layout.tokens_per_s))


def seconds_waited(layout: Layout, slowest: float, longest: float) -> float:
    """Return the seconds of a step in which devices wait for longer documents.

    Args:
        layout: the layout, with its step.
        slowest: the time of the slowest devices over the mean, where devices meet.
        longest: the longest micro-batch over the mean one. In a pipeline of p stages that take the same times, n
            micro-batches take the sum of their times and p - 1 times the longest one (a proportionate flow shop:
            Pinedo, Scheduling, section 6.1); the bubble of the step has p - 1 times the mean one. DualPipe's bubble is
            taken to grow likewise, for which no formula is published.
    """
    degrees, step = layout.degrees, layout.step
    behind = (degrees.pp - 1) / degrees.interleave * (longest - 1) / step.micro_batches
    if degrees.schedule == "dualpipe":
        behind = step.bubble_s * (longest - 1) / step.compute_s
    return step.compute_s * (slowest - 1 + behind)
