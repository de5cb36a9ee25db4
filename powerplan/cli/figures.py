"""`--plot`: checked before the work, drawn beside the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from powerplan.choices import Format
from powerplan.cli import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from powerplan.answers.base import DrawnAnswer
    from powerplan.cli.files import File

OPTION = "--plot"


def check_option(plot: str | None) -> None:
    """Raise an error where no figure could be drawn into `plot`, as check_plot does; None stands for no figure."""
    if plot is not None:
        from powerplan.plots.figure import check_plot

        check_plot(plot, OPTION)


def check(plot: str | None, force: bool, models: Sequence[str], measured: str | None = None) -> None:
    """Raise an error where `plot` cannot be written or drawn; models, measured: what the command reads.

    Raises:
        InputError: `plot` has another suffix, exists and `force` is not set, is read too, or cannot be written.
        MachineError: matplotlib is not installed.
    """
    if plot is None:
        return
    from powerplan.load import model_file
    from powerplan.output import check_targets

    check_targets({OPTION: plot}, force, {"--measured": measured})
    for model in models:
        check_targets({OPTION: plot}, force, {"MODEL": model_file(model)})
    check_option(plot)


def file(plot: str | None, draw: Callable[[], Figure]) -> File:
    """Return the file of a figure, which is drawn when the file is written; None for `plot` stands for no figure."""
    from powerplan.cli.files import File

    def content() -> bytes:
        from powerplan.plots.figure import figure_bytes, format_of

        return figure_bytes(draw(), format_of(str(plot)))

    return File(OPTION, plot, content)


def show(answer: DrawnAnswer, form: Format, plot: str | None, force: bool) -> None:
    """Print an answer, and draw it where `plot` names a file."""
    if plot is None:
        say.answer(answer, form)
        return
    from powerplan.cli.files import deliver
    from powerplan.cli.interrupts import kept

    with kept() as signals:
        deliver(lambda: say.answer(answer, form), [file(plot, answer.figure)], force, signals)
