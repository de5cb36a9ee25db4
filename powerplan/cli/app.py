"""The typer application: every command by name, and what stands before a command."""

from __future__ import annotations

from typing import Annotated

import typer

from powerplan.cli import catalogues, machine, plan
from powerplan.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Plan compute-optimal long-context models: where a model stands between weights and state.",
    epilog="Exit codes: 0 done, 2 bad usage or bad input. Data goes to stdout, remarks to stderr.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"powerplan {__version__}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("wsfr")(plan.wsfr)
app.command("dims")(plan.dims)
app.command("models")(catalogues.models)
app.command("hardware")(catalogues.hardware)
app.command("doctor")(machine.doctor)
app.command("schema")(machine.schema)
