"""`powerplan decode`."""

from __future__ import annotations

from typing import Annotated

import typer

import powerplan
from powerplan.choices import Twin
from powerplan.cli import options, say


def decode(
    models: Annotated[list[str], options.model_argument("One or more models, as for wsfr.", "MODEL...")],
    ctx: Annotated[str, typer.Option(help="Contexts in tokens: 65536, or a list such as 128k,1M.")] = "128k",
    batch: Annotated[str, typer.Option(help="Sequences decoded together: 8, or a list such as 1,8,64.")] = "1,8,64",
    gpu: options.DeviceOption = None,
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="Devices that share weights, state and work.")] = "1",
    twin: Annotated[
        Twin | None, options.choice_option(Twin, "Compare each model with itself when every layer has this mixer.")
    ] = None,
    mixer: options.MixerOption = None,
    dtype: options.DtypeOption = "bf16",
    output: options.FormatOption = "table",
) -> None:
    """What serving takes: bytes and time per decoded token, memory, the largest batch that fits, the prompt."""
    answer = powerplan.decode(models, ctx, batch=batch, gpu=gpu, devices=devices, twin=twin, mixer=mixer, dtype=dtype)
    say.answer(answer, output)
