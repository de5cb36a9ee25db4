"""The typer application: every command by its name, and the options that stand before a command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated

import typer

from powerplan.cli.help import COMMAND_PANELS, Command, Group
from powerplan.cli.shared import NO_COLOR, QUIET, prepared
from powerplan.version import __version__

COMMANDS = {
    "wsfr": "answers",
    "compare": "answers",
    "budget": "answers",
    "train": "train",
    "decode": "answers",
    "recommend": "recommend",
    "report": "page",
    "profile": "profile",
    "dims": "catalogues",
    "models": "catalogues",
    "hardware": "catalogues",
    "reproduce": "catalogues",
    "doctor": "catalogues",
    "schema": "catalogues",
}
"""The module of powerplan.cli that has each command's function, which has the command's name."""

CODES = (
    "Exit codes: 0 done, 2 bad usage or bad input, 3 nothing meets the constraints, 4 this machine cannot do it, "
    "130 interrupted (143 by SIGTERM). Notes go to stderr."
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"powerplan {__version__}")
        raise typer.Exit


def _before(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    quiet: QUIET = False,
    no_color: NO_COLOR = False,
) -> None:
    context.obj = {"quiet": quiet}
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def application(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Return the command line with the commands of these names."""
    built = typer.Typer(
        cls=Group,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Plan compute-optimal long-context models: where a model stands between weights and state.",
        epilog=CODES,
    )
    built.callback(invoke_without_command=True)(_before)
    for name in names:
        function = getattr(import_module(f"powerplan.cli.{COMMANDS[name]}"), name)
        built.command(name, cls=Command, rich_help_panel=COMMAND_PANELS.get(name))(prepared(function, COMMANDS))
    return built


def application_for(arguments: Sequence[str]) -> typer.Typer:
    """Return the command line for these arguments: typer reads the options of every command that it has.

    One command takes 8 ms, all of them 60 (two cores, x86_64). Where the first word that is no option names none, all
    are there.
    """
    first = next((word for word in arguments if not word.startswith("-")), "")
    return application([first] if first in COMMANDS else COMMANDS)
