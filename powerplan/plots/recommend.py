"""The figure of `powerplan recommend`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powerplan.accounting import Accounting
from powerplan.errors import listed
from powerplan.plots.figure import convention_text, name_of, styled
from powerplan.plots.over_context import ratio_and_state
from powerplan.report.parts import dtypes_text, show_ratio
from powerplan.search import Candidate, Recommendation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def recommend_figure(answer: Recommendation) -> Figure:
    """Return a figure of all candidates over the context: their weight-state FLOP ratios above, their state below.

    The target is drawn as a level, and the contexts of the answer are marked. The legend has the numbers of the table.

    Raises:
        MachineError: matplotlib is not installed.
    """
    request, base = answer.request, answer.base
    contexts = listed([f"{context:,}" for context in answer.contexts], "and")
    return ratio_and_state(
        [Accounting(candidate.spec, request.convention) for candidate in answer.candidates],
        answer.contexts,
        request.dtypes,
        names=[str(place) for place, _ in enumerate(answer.candidates, 1)],
        labels=[_label(place, candidate) for place, candidate in enumerate(answer.candidates, 1)],
        title=f"{name_of(base.spec)} at {contexts} tokens: candidates over the context",
        below=f"{convention_text(request.convention)}; {dtypes_text([base.spec], request.dtypes)}",
        unchanged=next((place for place, one in enumerate(answer.candidates) if one.plan.unchanged), None),
        target=request.target,
    )


def _label(place: int, candidate: Candidate) -> str:
    return f"{place}  {candidate.label}: {show_ratio(candidate.row.wsfr)}{', recommended' if place == 1 else ''}"
