"""`powerplan dims`."""

from __future__ import annotations

from typing import Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import FormatOption


def dims(
    head_dim: Annotated[str, typer.Option(help="Head dims: 64, or a list such as 32,64,128.")] = "64",
    p: Annotated[str, typer.Option("--p", help="Degrees: 2, or a list such as 2,3,4.")] = "1,2,3,4,5,6",
    tile: Annotated[str, typer.Option(metavar="INTEGER", help="Features in a tile of the tiled embedding.")] = "8",
    v_head_dim: Annotated[
        str | None, typer.Option(metavar="INTEGER", help="Value head dim; the head dim where it is not given.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Compare the states of these mixers with power attention's: kda,mamba2 or all."),
    ] = None,
    output: FormatOption = "table",
) -> None:
    """Dimensions of the power embeddings: tpow, spow and tiled spow, the state, and the window of the same state."""
    from powerplan.mixers.power import MAX_DEGREE
    from powerplan.report.dims import dims_report, states_report
    from powerplan.units import parse_integer, parse_integers

    head_dims = parse_integers(head_dim, "--head-dim", 1, 65536)
    degrees = parse_integers(p, "--p", 1, MAX_DEGREE)
    width = parse_integer(tile, "--tile", 1, 4096)
    values = None if v_head_dim is None else parse_integer(v_head_dim, "--v-head-dim", 1, 65536)
    if kind is None:
        say.show(dims_report(head_dims, degrees, width, values), output)
    else:
        say.show(states_report(head_dims, degrees, values, kind), output)
