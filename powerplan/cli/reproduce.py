"""`powerplan reproduce`."""

from __future__ import annotations

from typing import Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import FormatOption, completer


def names_of_sets() -> list[str]:
    from powerplan.reproduce import ALL, figure_sets

    return [*figure_sets(), ALL]


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="A set of figures: table2, table3, figure2, table4, power-speed, kimi, hybrids, or all.",
            autocompletion=completer(names_of_sets),
        ),
    ] = "all",
    output: FormatOption = "table",
) -> None:
    """Published figures beside what powerplan computes under each named convention, with the gap and its reason."""
    from powerplan.report.reproduce import reproduce_report
    from powerplan.reproduce import reproduce as compare

    say.show(reproduce_report(compare(name)), output)
