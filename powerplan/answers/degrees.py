"""Which degree of power attention for a model, and what the model then carries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsIndex

from powerplan.accounting import Accounting, Row
from powerplan.answers.base import Answer, Model, Whole, list_text, read_model, text_of
from powerplan.errors import parameter
from powerplan.mixers.formulas import Convention, convention_of
from powerplan.mixers.power import MAX_DEGREE
from powerplan.report.degrees import degrees_report
from powerplan.report.render import Report
from powerplan.swap.degrees import Degree, with_degrees
from powerplan.units import context_of, parse_integer, parse_integers


@dataclass(frozen=True, kw_only=True, repr=False)
class DegreesAnswer(Answer):
    """A model with power attention of several degrees in every layer.

    accounting, row: the model as it is, and its numbers at the context. degrees: what it carries with each degree.
    tile: features in a tile of the tiled embedding.
    """

    accounting: Accounting
    row: Row
    degrees: tuple[Degree, ...]
    tile: int

    @property
    def largest(self) -> Degree | None:
        """The largest of the degrees whose state FLOPs are no more than the weight FLOPs, or None."""
        light = [degree for degree in self.degrees if degree.row.wsfr is None or degree.row.wsfr >= 1]
        return max(light, key=lambda degree: degree.p, default=None)

    def _report(self) -> Report:
        return degrees_report(self.accounting, self.row, self.degrees, self.largest, self.tile)


def degrees(
    model: Model,
    context: Whole = "64k",
    *,
    p: Whole | Iterable[SupportsIndex] = (1, 2, 3, 4),
    tile: Whole = 8,
    convention: Convention | None = None,
) -> DegreesAnswer:
    """Return what a model carries with power attention of each degree, as `powerplan dims --model` prints it.

    Args:
        model: a catalogue name, a path to a YAML or a config.json, a spec, or a config (as load_model takes it).
        context: tokens at which FLOPs are counted, as 65536 or "64k".
        p: degrees, as 2, "1,2,3" or [1, 2, 3].
        tile: features in a tile of the tiled embedding.
        convention: how FLOPs are counted; Convention() where None.

    Raises:
        InputError: an argument cannot be used, or the model has no mixers.

    Examples:
        >>> answer = degrees("gpt2-small", "64k", p=[2, 3])
        >>> [degree.same_state_window for degree in answer.degrees], answer.largest.p
        ([1040, 22880], 2)
    """
    chosen = parse_integers(list_text(p), parameter("p"), 1, MAX_DEGREE)
    at, width = context_of(context, parameter("context")), parse_integer(text_of(tile), parameter("tile"), 1, 4096)
    loaded = read_model(model)
    convention = convention_of(convention)
    found = with_degrees(loaded.spec, chosen, at, convention)
    accounting = Accounting(loaded.spec, convention)
    remarks = dict.fromkeys(remark for degree in found for remark in degree.remarks)
    return DegreesAnswer(
        accounting=accounting,
        row=accounting.row(at),
        degrees=tuple(found),
        tile=width,
        notes=(*loaded.notes, *remarks),
    )
