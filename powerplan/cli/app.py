"""The typer application: every command by its name, and the options that stand before a command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import typer

from powerplan.cli import answers, catalogues, page, profile, recommend, train
from powerplan.version import __version__

COMMANDS: dict[str, Callable[..., None]] = {
    "wsfr": answers.wsfr,
    "compare": answers.compare,
    "budget": answers.budget,
    "train": train.train,
    "decode": answers.decode,
    "recommend": recommend.recommend,
    "report": page.report,
    "profile": profile.profile,
    "dims": catalogues.dims,
    "models": catalogues.models,
    "hardware": catalogues.hardware,
    "reproduce": catalogues.reproduce,
    "doctor": catalogues.doctor,
    "schema": catalogues.schema,
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"powerplan {__version__}")
        raise typer.Exit


def _before(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def application(names: Iterable[str]) -> typer.Typer:
    """Return the command line with the commands of these names."""
    built = typer.Typer(
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Plan compute-optimal long-context models: where a model stands between weights and state.",
        epilog="Exit codes: 0 done, 2 bad usage or bad input, 3 nothing meets the constraints, "
        "4 this machine cannot do it, 130 interrupted (143 by SIGTERM). Notes go to stderr.",
    )
    built.callback(invoke_without_command=True)(_before)
    for name in names:
        built.command(name)(COMMANDS[name])
    return built


app = application(COMMANDS)


def application_for(arguments: Sequence[str]) -> typer.Typer:
    """Return the command line for these arguments: typer reads the options of every command that it has.

    One command takes 8 ms, all of them 60 (two cores, x86_64). Where the first argument names none, all are there.
    """
    return application(arguments[:1]) if arguments and arguments[0] in COMMANDS else app
