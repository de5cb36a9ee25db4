"""Training runs over documents of many lengths: the layout that is fastest with the time that devices wait in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from powerplan.lengths.flops import DocumentRow
from powerplan.run.layouts import Layout, Layouts
from powerplan.run.search import SLOWER, Found, simplest_of_fastest
from powerplan.run.waiting import DocumentOrder, Waiting

LEAST_COMPARED = 6
"""Layouts whose waiting is found at least: JSON shows the best and five others."""


@dataclass(frozen=True)
class DocumentPlan:
    """A phase of a run over documents, in the layout of its plan.

    row: the FLOPs of the documents. waiting: how much longer the slowest devices work than the mean. even_s: seconds of
    a step if no device waited. sorted_waiting_s: seconds of waiting in a step where sequences are sorted by their work.
    unmasked_s: seconds of a step in the same layout where every token attends to all before it in its sequence.
    """

    row: DocumentRow
    waiting: Waiting
    even_s: float
    sorted_waiting_s: float
    unmasked_s: float

    @property
    def sorted_s(self) -> float:
        """Seconds of a step where sequences are sorted by their work, and documents shared evenly."""
        return self.even_s + self.sorted_waiting_s


def with_documents(layouts: Layouts, found: Found) -> tuple[Found, DocumentPlan]:
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
    slowed: list[Layout] = []
    fastest = 0.0
    for number, layout in enumerate(ranked):
        if number >= LEAST_COMPARED and layout.tokens_per_s * SLOWER < fastest:
            break
        waiting = order.waiting(layout)
        waiting_s = seconds_waited(layout, waiting.come, waiting.come_longest)
        slowed.append(replace(layout, step=replace(layout.step, waiting_s=waiting_s)))
        fastest = max(fastest, slowed[-1].tokens_per_s)
    best = simplest_of_fastest(slowed)
    others = sorted((layout for layout in slowed if layout is not best), key=lambda layout: -layout.tokens_per_s)
    return replace(found, best=best, others=tuple(others)), _document_plan(layouts, best, order)


def _document_plan(layouts: Layouts, layout: Layout, order: DocumentOrder) -> DocumentPlan:
    whole = Layouts(layouts.accounting, layout.context, replace(layout.setting, lengths=None))
    unmasked = whole.layout(layout.degrees, layout.recipe, layout.sequences)
    waiting, even_s = order.waiting(layout), layout.step_s - layout.step.waiting_s
    sorted_s = seconds_waited(layout, waiting.sorted, waiting.sorted_longest)
    return DocumentPlan(layouts.documents, waiting, even_s, sorted_s, unmasked.step_s)


def seconds_waited(layout: Layout, slowest: float, longest: float) -> float:
    """Return the seconds of a step in which devices wait for longer documents.

    Args:
        layout: the layout, with its step.
        slowest: the time of the slowest devices over the mean, where devices meet.
        longest: the longest micro-batch over the mean one. In a pipeline of p stages that take the same times, n
            micro-batches take the sum of their times and p - 1 times the longest one (a proportionate flow shop:
            Pinedo, Scheduling, section 6.1); the bubble of the step has p - 1 times the mean one.
    """
    degrees, step = layout.degrees, layout.step
    behind = (degrees.pp - 1) / degrees.interleave * (longest - 1) / step.micro_batches
    return step.compute_s * (slowest - 1 + behind)
