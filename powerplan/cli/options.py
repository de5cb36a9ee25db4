"""Options and arguments that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from powerplan.report.render import Format

if TYPE_CHECKING:
    from powerplan.spec import ModelSpec


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
MixerOption = Annotated[
    str | None,
    typer.Option(
        "--mixer",
        help="What if every sequence mixer were this: attention, window:4096, power:p=2,gated=true, kda, mamba2 ...",
    ),
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print the result; JSON is never rounded.")]


def read_model(model: str, mixer: str | None) -> tuple[ModelSpec, list[str]]:
    """Return the spec that MODEL and --mixer mean, and remarks for the user."""
    from powerplan.load import load_model
    from powerplan.whatif import with_mixer

    loaded = load_model(model)
    if mixer is None:
        return loaded.spec, list(loaded.notes)
    spec, remarks = with_mixer(loaded.spec, mixer)
    return spec, [*loaded.notes, *remarks]
