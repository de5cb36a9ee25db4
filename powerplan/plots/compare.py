"""The figure of `powerplan compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from powerplan.accounting import Accounting
from powerplan.dtypes import Dtypes
from powerplan.plots.figure import convention_text, name_of, styled
from powerplan.plots.over_context import ratio_and_state
from powerplan.report.parts import balance_text, dtypes_text, parameters_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def compare_figure(accountings: Sequence[Accounting], contexts: Sequence[int], dtypes: Dtypes) -> Figure:
    """Return a figure of models over the context: their weight-state FLOP ratios above, their state below.

    accountings: the models, all in one convention. contexts: those that were asked for, in tokens, marked on each line.

    Raises:
        MachineError: matplotlib is not installed.
    """
    specs = [accounting.spec for accounting in accountings]
    return ratio_and_state(
        accountings,
        contexts,
        dtypes,
        names=[name_of(spec) for spec in specs],
        labels=[f"{name_of(accounting.spec)}: {_balance(accounting)}" for accounting in accountings],
        title="Weight-state FLOP ratio and state over the context",
        below=f"{convention_text(accountings[0].convention)}; {dtypes_text(specs, dtypes)}",
    )


def _balance(accounting: Accounting) -> str:
    return f"{parameters_text(accounting)}, {balance_text(accounting).removesuffix(' tokens')}"
