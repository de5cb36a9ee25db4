"""`powerplan decode`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from powerplan.cli import options, say
from powerplan.report.render import Format


class Twin(StrEnum):
    mla = "mla"
    attention = "attention"


def decode(
    models: Annotated[list[str], options.model_argument("One or more models, as for wsfr.", "MODEL...")],
    ctx: Annotated[str, typer.Option(help="Contexts in tokens: 65536, or a list such as 128k,1M.")] = "128k",
    batch: Annotated[str, typer.Option(help="Sequences decoded together: 8, or a list such as 1,8,64.")] = "1,8,64",
    hardware: options.DeviceOption = None,
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="Devices that share weights, state and work.")] = "1",
    twin: Annotated[
        Twin | None, options.choice_option(Twin, "Compare each model with itself when every layer has this mixer.")
    ] = None,
    mixer: options.MixerOption = None,
    dtype: options.DtypeOption = options.Dtype.bf16,
    output: options.FormatOption = Format.table,
) -> None:
    """What serving takes: bytes and time per decoded token, memory, the largest batch that fits, the prompt."""
    from powerplan.answers.decode import decode as decode_models
    from powerplan.errors import InputError, renamed_place
    from powerplan.hardware import find_device, peak_of
    from powerplan.serving import MAX_BATCH
    from powerplan.units import parse_contexts, parse_integer, parse_integers

    contexts = parse_contexts(ctx, "--ctx")
    batches = parse_integers(batch, "--batch", 1, MAX_BATCH)
    count = parse_integer(devices, "--devices", 1, 10**7)
    if hardware is None and count > 1:
        raise InputError("--devices needs the device; such as --hardware h100-sxm")
    device = None if hardware is None else find_device(hardware)
    if device is not None:
        peak_of(device)  # A device without the rates that times need is refused before a model is read.
    with renamed_place({"twin": "--twin"}):
        answer = decode_models(
            [options.loaded_model(model, mixer) for model in models],
            contexts,
            batch=batches,
            gpu=device,
            devices=count,
            twin=twin.value if twin else None,
            dtype=dtype.value,
        )
    say.answer(answer, output)
