"""The typer application: every command by its name, and the options that stand before a command."""

from __future__ import annotations

from typing import Annotated

import typer

from powerplan.cli import answers, catalogues, profile, recommend
from powerplan.version import __version__

app = typer.Typer(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Plan compute-optimal long-context models: where a model stands between weights and state.",
    epilog="Exit codes: 0 done, 2 bad usage or bad input, 3 nothing meets the constraints, "
    "4 this machine cannot do it. Notes go to stderr.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"powerplan {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _before(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("wsfr")(answers.wsfr)
app.command("compare")(answers.compare)
app.command("budget")(answers.budget)
app.command("decode")(answers.decode)
app.command("recommend")(recommend.recommend)
app.command("profile")(profile.profile)
app.command("dims")(catalogues.dims)
app.command("models")(catalogues.models)
app.command("hardware")(catalogues.hardware)
app.command("reproduce")(catalogues.reproduce)
app.command("doctor")(catalogues.doctor)
app.command("schema")(catalogues.schema)
