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
    read_model,
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
            help="One model or more, as for wsfr.",
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
    from fractions import Fraction

    from powerplan.accounting import Accounting
    from powerplan.errors import InputError
    from powerplan.hardware import find_device
    from powerplan.report.decode import Served, decode_report
    from powerplan.serving import MAX_BATCH, Fleet
    from powerplan.serving import twin as twin_of
    from powerplan.units import parse_contexts, parse_integer, parse_integers

    contexts = parse_contexts(ctx, "--ctx")
    batches = parse_integers(batch, "--batch", 1, MAX_BATCH)
    count = parse_integer(devices, "--devices", 1, 10**7)
    if hardware is None and count > 1:
        raise InputError("--devices needs the device; such as --hardware h100-sxm")
    fleet = None if hardware is None else Fleet(find_device(hardware), count)
    if fleet is not None:
        fleet.seconds(Fraction(1), Fraction(1))  # Says at once where the device has no such rate.
    served: list[Served] = []
    remarks: list[str] = []
    for model in models:
        spec, notes = read_model(model, mixer)
        accounting = Accounting(spec)
        remarks.extend(f"{spec.name}: {remark}" for remark in notes)
        served.append(Served(accounting))
        if twin is not None:
            other, notes = twin_of(accounting, twin.value)
            remarks.extend(f"{other.spec.name}: {remark}" for remark in notes)
            served.append(Served(other, (len(served) - 1, twin.value)))
    report = decode_report(served, contexts, batches, dtype.value, fleet)
    for remark in remarks:
        say.note(remark)
    say.show(report, output)
