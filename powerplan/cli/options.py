"""Options and arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from powerplan.report.render import Format


def complete_model(incomplete: str) -> list[str]:
    """Return the catalogue names and aliases that begin with what has been typed."""
    from powerplan.load import known_names

    return [name for name in known_names() if name.startswith(incomplete.lower())]


def complete_device(incomplete: str) -> list[str]:
    """Return the device names that begin with what has been typed."""
    from powerplan.hardware import devices

    return [name for name in devices() if name.startswith(incomplete.lower())]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A powerplan YAML, a Hugging Face config.json or its folder, or a catalogue name (powerplan models).",
        autocompletion=complete_model,
        show_default=False,
    ),
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print the result; JSON is never rounded.")]
