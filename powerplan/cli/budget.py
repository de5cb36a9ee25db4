"""`powerplan budget`."""

from __future__ import annotations

from typing import Annotated

import typer

import powerplan
from powerplan.cli import options, say


def budget(
    model: options.Model,
    ctx: Annotated[str, typer.Option(help="Context in tokens: 65536 or 64k.")] = "64k",
    flops: Annotated[str | None, typer.Option(help="Total training FLOPs, such as 1e21.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens, such as 300B.")] = None,
    gpu_hours: Annotated[str | None, typer.Option(help="Device hours in all; needs --gpu.")] = None,
    gpu: options.DeviceOption = None,
    mfu: Annotated[str, typer.Option(help="Share of the dense bf16 peak that training reaches.")] = "0.4",
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="Devices that work at once.")] = "1",
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens per optimiser step, such as 512k (=524288).")] = None,
    mixer: options.MixerOption = None,
    measured: options.MeasuredOption = None,
    form: options.FormOption = "recurrent",
    causal: options.CausalOption = "exact",
    exclude: options.ExcludeOption = None,
    dtype: options.DtypeOption = "bf16",
    output: options.FormatOption = "table",
) -> None:
    """What a budget buys: FLOPs to tokens, sequences, steps and days, and to tokens of other mixers."""
    answer = powerplan.budget(
        model,
        ctx,
        flops=flops,
        tokens=tokens,
        gpu_hours=gpu_hours,
        gpu=gpu,
        mfu=mfu,
        devices=devices,
        batch_tokens=batch_tokens,
        measured=measured,
        mixer=mixer,
        convention=options.convention(form, causal, exclude),
        dtype=dtype,
    )
    say.answer(answer, output)
