"""`powerplan decode`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    FormatOption,
    MixerOption,
    choice_option,
    complete_model,
)
from powerplan.report.render import Format


class Twin(StrEnum):
    mla = "mla"
    attention = "attention"


def decode(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="One or more models, each as for wsfr.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ],
    ctx: Annotated[str, typer.Option(help="Contexts in tokens: 65536, or a list such as 128k,1M.")] = "128k",
    batch: Annotated[str, typer.Option(help="Sequences decoded together: 8, or a list such as 1,8,64.")] = "1,8,64",
    hardware: DeviceOption = None,
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="Devices that share weights, state and work.")] = "1",
    twin: Annotated[
        Twin | None, choice_option(Twin, "Compare each model with itself when every layer has this mixer.")
    ] = None,
    mixer: MixerOption = None,
    dtype: DtypeOption = Dtype.bf16,
    output: FormatOption = Format.table,
) -> None:
    """What serving takes: bytes and time per decoded token, memory, the largest batch that fits, the prompt."""
    from powerplan.answers.decode import decode as decode_models

    answer = decode_models(
        models,
        ctx,
        batch=batch,
        gpu=hardware,
        devices=devices,
        twin=twin.value if twin else None,
        mixer=mixer,
        dtype=dtype.value,
    )
    say.answer(answer, output)
