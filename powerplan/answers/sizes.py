"""Which model a budget of training FLOPs supports, and at which context: `budget` without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from powerplan.answers.base import DrawnAnswer
from powerplan.dtypes import Dtypes
from powerplan.dump import check_name, short_name, spec_to_yaml
from powerplan.errors import InputError, parameter
from powerplan.mixers.formulas import Convention
from powerplan.report.render import Report
from powerplan.report.sizes import sizes_report
from powerplan.search.sizing import Sized, Sizing, sizes_for
from powerplan.training import Throughput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CONTEXTS = 16
"""The most contexts of one question: each is a search that takes 0.1 to 1 s."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SizesAnswer(DrawnAnswer):
    """Which models a budget supports.

    sizing: the shapes of the catalogue at the sizes of the budget, by context. dtypes: the number formats of weights,
    key/value cache and recurrent state. batch_tokens: tokens of an optimizer step, None where no steps are counted.
    throughput: the devices that the budget runs on, None where none was named.
    """

    sizing: Sizing
    dtypes: Dtypes
    batch_tokens: int | None = None
    throughput: Throughput | None = None

    @property
    def rows(self) -> tuple[Sized, ...]:
        """The shapes at each context, as they are and with what balances them."""
        return self.sizing.rows

    @property
    def balanced(self) -> tuple[Sized, ...]:
        """The shapes as they are, each at the context that balances it."""
        return self.sizing.balanced

    @property
    def gpu_hours(self) -> float | None:
        """Hours of one device that the budget takes; None without a device."""
        return None if self.throughput is None else float(self.sizing.total_flops / self.throughput.flops_per_s) / 3600

    def to_yaml(self, place: int = 0, name: str | None = None) -> str:
        """Return the model of the row at `place` (from 0) as a powerplan YAML."""
        spec = self.rows[place].spec
        named = short_name(spec.name) if name is None else check_name(name, parameter("name"))
        return spec_to_yaml(spec, named)

    def figure(self) -> Figure:
        """Return the parameters of each shape at the size of the budget, by context."""
        from powerplan.plots.sizes import sizes_figure

        return sizes_figure(self.sizing)

    def _report(self) -> Report:
        return sizes_report(self.sizing, self.dtypes, self.batch_tokens, self.throughput)


def sizes_answer(
    total_flops: Fraction,
    contexts: Sequence[int],
    *,
    mixer: str | None,
    convention: Convention | None,
    dtypes: Dtypes,
    batch_tokens: int | None,
    throughput: Throughput | None,
) -> SizesAnswer:
    """Return which models `total_flops` of training support at each context, as `budget` says it without a model.

    Raises:
        InputError: too many contexts, or a mixer that suits no shape.
        InfeasibleError: no shape has a size for the budget.
    """
    if len(contexts) > MAX_CONTEXTS:
        problem = f"{len(contexts):,} contexts are too many to size models at; give {MAX_CONTEXTS} at most"
        raise InputError(problem, parameter("context"))
    sizing = sizes_for(total_flops, contexts, mixer=mixer, convention=convention, dtypes=dtypes)
    return SizesAnswer(
        sizing=sizing,
        dtypes=dtypes,
        batch_tokens=batch_tokens,
        throughput=throughput,
        notes=sizing.notes,
    )
