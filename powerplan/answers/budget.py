"""What a training budget buys: tokens, steps and days, and what the same FLOPs buy with other mixers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from powerplan.accounting import Accounting
from powerplan.answers.base import Answer, Model, optional, read_device, read_devices, read_measured, read_model
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError, parameter
from powerplan.hardware import Device, peak_of
from powerplan.measured import MeasuredTimes
from powerplan.mixers.formulas import Convention
from powerplan.report.budget import budget_report
from powerplan.report.render import Report
from powerplan.training import Alternative, Budget, Throughput, TrainingTime, alternatives, budget_of, training_time
from powerplan.units import MAX_COUNT, parse_context, parse_count, parse_hours, parse_share


@dataclass(frozen=True, kw_only=True)
class BudgetAnswer(Answer):
    """What a training budget buys.

    budget: FLOPs, tokens and sequences of the model.
    alternatives: the same FLOPs with other mixers in every layer, the model as it is first.
    dtypes: the number formats of weights, key/value cache and recurrent state.
    batch_tokens: tokens of an optimiser step, None where no steps are counted.
    time: how the device hours are found, None without a device.
    """

    budget: Budget
    alternatives: tuple[Alternative, ...]
    dtypes: Dtypes
    batch_tokens: int | None = None
    time: TrainingTime | None = None

    @property
    def gpu_hours(self) -> float | None:
        """Hours of one device that the budget takes; None without a device."""
        return None if self.time is None else self.time.device_seconds(self.budget) / 3600

    def _report(self) -> Report:
        return budget_report(self.budget, self.alternatives, self.dtypes, self.batch_tokens, self.time)


def budget(
    model: Model,
    context: int | str = "64k",
    *,
    flops: int | float | str | None = None,
    tokens: int | float | str | None = None,
    gpu_hours: int | float | str | None = None,
    gpu: str | Device | None = None,
    mfu: float | str = 0.4,
    devices: int | str = 1,
    batch_tokens: int | str | None = None,
    measured: str | Path | MeasuredTimes | None = None,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> BudgetAnswer:
    """Return what a training budget buys, as `powerplan budget` prints it.

    One of flops, tokens and gpu_hours is the budget; without any it is 20 tokens per active parameter.

    Args:
        model: a catalogue name, a path to a YAML or a config.json, or a spec.
        context: tokens of a sequence, as 65536 or "64k".
        flops: training FLOPs in all, as 1e21 or "1e21".
        tokens: training tokens, as 3e11 or "300B".
        gpu_hours: hours of one device in all; needs `gpu` or `measured`.
        gpu: the exact name of a device, such as "h100-sxm".
        mfu: the share of the device's dense bf16 peak that training reaches.
        devices: how many devices work at once.
        batch_tokens: tokens of an optimiser step, as "512k".
        measured: a file of `powerplan profile --save`: measured times of mixers in place of estimates.
        mixer: the mixer to put into every layer, such as "power:p=2".
        convention: how FLOPs are counted; Convention() where None.
        dtype: the number format of weights and key/value cache: fp32, bf16, fp16, fp8 or int4. Weights that the file of
            a model quantizes have their own.
        weights_dtype, cache_dtype, state_dtype: that of all weights, of the cache, of recurrent state (fp32) apart.

    Returns:
        The answer: `budget` holds tokens, sequences and FLOPs per token.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name.

    Example:
        >>> answer = budget("gpt2-small", "64k", flops=1e21, gpu="h100-sxm", devices=8)
        >>> answer.budget.tokens, round(answer.gpu_hours)
        (229088454035, 702)
    """
    at = parse_context(str(context), parameter("context"))
    budgets = {"flops": flops, "tokens": tokens, "gpu_hours": gpu_hours}
    given = [parameter(name) for name, value in budgets.items() if value]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are one budget twice; give one of them")
    share, count = parse_share(str(mfu), parameter("mfu")), read_devices(devices)
    profile, device = read_measured(measured), read_device(gpu)
    peak = peak_of(device) if device is not None else profile.peak() if profile is not None else None
    if peak is None and (gpu_hours is not None or profile is not None or count > 1):
        name = "gpu_hours" if gpu_hours is not None else "measured" if profile is not None else "devices"
        raise InputError(f"{parameter(name)} needs the device; such as {parameter('gpu', 'h100-sxm')}")
    wanted_tokens = optional(parse_count, "tokens", tokens, "a count of tokens")
    total: Fraction | int | None = optional(parse_count, "flops", flops, "a count of FLOPs")
    hours = optional(parse_hours, "gpu_hours", gpu_hours)
    step = optional(parse_context, "batch_tokens", batch_tokens)

    dtypes = Dtypes(dtype, weights_dtype, cache_dtype, state_dtype)
    loaded = read_model(model, mixer)
    notes = list(loaded.notes)
    accounting = Accounting(loaded.spec, convention)
    time = None
    if peak is not None:
        time = training_time(loaded.spec, accounting.row(at, dtypes), Throughput(peak, share, count), profile)
        if time.missing is not None:
            counted = parameter("mfu", f"{float(share):g}")
            notes.append(f"{time.missing.describe()}: time is counted at {counted} instead")
        elif profile is not None and (remark := profile.elsewhere(peak.name)) is not None:
            notes.append(remark)
        if hours is not None and time.measured is not None:
            wanted_tokens = max(1, int(hours * 3600 / Fraction(time.measured)))
        elif hours is not None:
            total = hours * 3600 * time.throughput.flops_per_s
            if total > MAX_COUNT:
                raise InputError("more FLOPs than 1e40", parameter("gpu_hours"))
    exact = None if total is None else Fraction(total)
    bought = budget_of(accounting, at, flops=exact, tokens=wanted_tokens, dtypes=dtypes)
    if not given:
        flops_, tokens_, hours_ = map(parameter, budgets)
        notes.append(f"no budget given: 20 tokens per active parameter assumed; give {flops_}, {tokens_} or {hours_}")
    return BudgetAnswer(
        budget=bought,
        alternatives=tuple(alternatives(bought, dtypes)),
        dtypes=dtypes,
        batch_tokens=step,
        time=time,
        notes=(*notes, *bought.warnings()),
    )
