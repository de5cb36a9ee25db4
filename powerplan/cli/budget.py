"""`powerplan budget`."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import typer

from powerplan.cli import say
from powerplan.cli.options import (
    Causal,
    CausalOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ExcludeOption,
    Form,
    FormatOption,
    FormOption,
    MeasuredOption,
    MixerOption,
    Model,
    convention_of,
    read_model,
)
from powerplan.report.render import Format


def budget(
    model: Model,
    ctx: Annotated[str, typer.Option(help="Context in tokens: 65536 or 64k.")] = "64k",
    flops: Annotated[str | None, typer.Option(help="Total training FLOPs, such as 1e21.", show_default=False)] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens, such as 300B.", show_default=False)] = None,
    gpu_hours: Annotated[
        str | None, typer.Option("--gpu-hours", help="Device hours in all; needs --gpu.", show_default=False)
    ] = None,
    gpu: DeviceOption = None,
    mfu: Annotated[str, typer.Option(help="Share of the dense bf16 peak that training reaches.")] = "0.4",
    devices: Annotated[str, typer.Option(metavar="INTEGER", help="Devices that work at once.")] = "1",
    batch_tokens: Annotated[
        str | None,
        typer.Option("--batch-tokens", help="Tokens per optimiser step, such as 512k (=524288).", show_default=False),
    ] = None,
    mixer: MixerOption = None,
    measured: MeasuredOption = None,
    form: FormOption = Form.recurrent,
    causal: CausalOption = Causal.exact,
    exclude: ExcludeOption = None,
    dtype: DtypeOption = Dtype.bf16,
    output: FormatOption = Format.table,
) -> None:
    """What a budget buys: FLOPs to tokens, sequences, steps and days, and to tokens of other mixers."""
    from powerplan.accounting import Accounting
    from powerplan.errors import InputError
    from powerplan.hardware import find_device, peak_of
    from powerplan.measured import read_profile
    from powerplan.report.budget import budget_report
    from powerplan.training import Throughput, alternatives, budget_of, training_time
    from powerplan.units import MAX_COUNT, parse_context, parse_count, parse_integer, parse_share

    context = parse_context(ctx, "--ctx")
    given = [name for name, value in (("--flops", flops), ("--tokens", tokens), ("--gpu-hours", gpu_hours)) if value]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are one budget twice; give one of them")
    share = parse_share(mfu, "--mfu")
    count = parse_integer(devices, "--devices", 1, 10**7)
    profile = None if measured is None else read_profile(measured)
    peak = peak_of(find_device(gpu)) if gpu is not None else profile.peak() if profile is not None else None
    if peak is None and (gpu_hours is not None or measured is not None or count > 1):
        option = "--gpu-hours" if gpu_hours is not None else "--measured" if measured is not None else "--devices"
        raise InputError(f"{option} needs the device; such as --gpu h100-sxm")
    throughput = None if peak is None else Throughput(peak, share, count)
    wanted_tokens = None if tokens is None else parse_count(tokens, "--tokens", "a count of tokens")
    total = None if flops is None else Fraction(parse_count(flops, "--flops", "a count of FLOPs"))
    hours = None if gpu_hours is None else _hours(gpu_hours)
    step = None if batch_tokens is None else parse_context(batch_tokens, "--batch-tokens")

    spec, notes = read_model(model, mixer)
    accounting = Accounting(spec, convention_of(form, causal, exclude))
    time = None
    if throughput is not None:
        time = training_time(spec, accounting.row(context), throughput, profile)
        if time.missing is not None:
            notes.append(f"{time.missing.describe()}: time is counted at --mfu {mfu} instead")
        elif profile is not None and (remark := profile.elsewhere(throughput.peak.name)) is not None:
            notes.append(remark)
    if time is not None and hours is not None:
        if time.measured is not None:
            wanted_tokens = max(1, int(hours * 3600 / Fraction(time.measured)))
        else:
            total = hours * 3600 * time.throughput.flops_per_s
        if total is not None and total > MAX_COUNT:
            raise InputError("more FLOPs than 1e40", "--gpu-hours")
    result = budget_of(accounting, context, flops=total, tokens=wanted_tokens, dtype=dtype.value)
    if not given:
        notes.append("no budget given: 20 tokens per active parameter assumed; give --flops, --tokens or --gpu-hours")
    report = budget_report(result, alternatives(result, dtype.value), dtype.value, step, time)
    for remark in (*notes, *result.warnings()):
        say.note(remark)
    say.show(report, output)


def _hours(text: str) -> Fraction:
    """Return hours from "1000", "2.5k" or "1.2M" (decimal)."""
    from powerplan.units import parse_count

    whole, point, rest = text.partition(".")
    if point and rest.isdigit() and whole.isdigit() and len(text) < 30 and Fraction(text) > 0:
        return Fraction(text)
    return Fraction(parse_count(text, "--gpu-hours", "a number of hours"))
