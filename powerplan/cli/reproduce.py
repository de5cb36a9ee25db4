"""`powerplan reproduce`."""

from __future__ import annotations

from typing import Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import FormatOption


def complete_set(incomplete: str) -> list[str]:
    """Return the names of sets that begin with what has been typed."""
    from powerplan.reproduce import ALL, figure_sets

    return [name for name in (*figure_sets(), ALL) if name.startswith(incomplete.lower())]


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="A set of figures: table2, table3, figure2, table4, power-speed, kimi, hybrids, or all.",
            autocompletion=complete_set,
        ),
    ] = "all",
    output: FormatOption = "table",
) -> None:
    """Published figures beside what powerplan computes under each named convention, with the gap and its reason."""
    from powerplan.report.reproduce import reproduce_report
    from powerplan.reproduce import reproduce as compare

    say.show(reproduce_report(compare(name)), output)
