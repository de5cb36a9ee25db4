"""What a training budget buys: tokens, steps and days, and what the same FLOPs buy with other mixers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

from powerplan.accounting import Accounting
from powerplan.answers import base
from powerplan.answers.base import Contexts, DrawnAnswer, Model, Whole, optional
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError, parameter
from powerplan.hardware import Device, needs_device, peak_of
from powerplan.lengths import Lengths, LengthsInput, read_lengths
from powerplan.measured import MeasuredTimes
from powerplan.mixers.formulas import Convention
from powerplan.report.budget import budget_report, budgets_report
from powerplan.report.render import Report
from powerplan.spec import ModelSpec
from powerplan.training import Alternative, Bought, Budget, Throughput, TrainingTime, budget_of, training_time
from powerplan.training import alternatives as alternatives_to
from powerplan.units import MAX_COUNT, parse_context, parse_count, parse_hours, parse_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from powerplan.answers.sizes import SizesAnswer

DEFAULT_CONTEXT, CONTEXTS_WITHOUT_MODEL = "64k", "8k,32k,128k"

MAX_ROWS = 1000
"""The most models times contexts of one question."""


@dataclass(frozen=True, kw_only=True, repr=False)
class BudgetAnswer(DrawnAnswer):
    """What a training budget buys.

    rows: for each context, in order, each model's FLOPs, tokens and sequences, and how its time is found.
    dtypes: the number formats of weights, key/value cache and recurrent state.
    batch_tokens: tokens of an optimizer step, None where no steps are counted.
    lengths: the documents, where there are documents of many lengths: the rows then say what masks make of them too.

    The other attributes are those of one model at one context, and raise InputError where there are more.
    """

    rows: tuple[Bought, ...]
    dtypes: Dtypes
    batch_tokens: int | None = None
    lengths: Lengths | None = None

    @property
    def budget(self) -> Budget:
        """FLOPs, tokens and sequences of the model."""
        return self._only("budget").budget

    @property
    def masked(self) -> Budget | None:
        """The same where tokens attend within their documents; None without `lengths`."""
        return self._only("masked").masked

    @cached_property
    def alternatives(self) -> tuple[Alternative, ...]:
        """The same FLOPs with other mixers in every layer, the model as it is first."""
        own = self._only("alternatives")
        return tuple(alternatives_to(own.budget, self.dtypes, own.masked))

    @property
    def time(self) -> TrainingTime | None:
        """How the device hours are found, None without a device."""
        return self._only("time").time

    @property
    def gpu_hours(self) -> float | None:
        """Hours of one device that the budget takes; None without a device."""
        return self._only("gpu_hours").gpu_hours

    def _only(self, name: str) -> Bought:
        if len(self.rows) > 1:
            raise InputError(f"is of one model at one context, and this answer has {len(self.rows):,} rows", name)
        return self.rows[0]

    def figure(self) -> Figure:
        """Return the tokens that the FLOPs buy: with each mixer, or of each model over the context."""
        from powerplan.plots.budget import budget_figure, budgets_figure

        if self.lengths is not None:
            raise InputError("are not drawn: a figure shows whole sequences", parameter("lengths"))
        if len(self.rows) > 1:
            return budgets_figure(self.rows)
        return budget_figure(self.budget, self.alternatives)

    def _report(self) -> Report:
        if len(self.rows) > 1:
            return budgets_report(self.rows, self.dtypes, self.batch_tokens)
        return budget_report(self.rows[0], self.alternatives, self.dtypes, self.batch_tokens)


@overload
def budget(
    model: Model | Sequence[Model],
    context: Contexts | None = None,
    *,
    flops: Whole | float | None = None,
    tokens: Whole | float | None = None,
    gpu_hours: Whole | float | None = None,
    gpu: str | Device | None = None,
    mfu: float | str = 0.4,
    devices: Whole = 1,
    batch_tokens: Whole | None = None,
    lengths: LengthsInput | None = None,
    measured: str | Path | MeasuredTimes | None = None,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> BudgetAnswer: ...


@overload
def budget(
    model: None = None,
    context: Contexts | None = None,
    *,
    flops: Whole | float | None = None,
    gpu_hours: Whole | float | None = None,
    gpu: str | Device | None = None,
    mfu: float | str = 0.4,
    devices: Whole = 1,
    batch_tokens: Whole | None = None,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> SizesAnswer: ...


def budget(
    model: Model | Sequence[Model] | None = None,
    context: Contexts | None = None,
    *,
    flops: Whole | float | None = None,
    tokens: Whole | float | None = None,
    gpu_hours: Whole | float | None = None,
    gpu: str | Device | None = None,
    mfu: float | str = 0.4,
    devices: Whole = 1,
    batch_tokens: Whole | None = None,
    lengths: LengthsInput | None = None,
    measured: str | Path | MeasuredTimes | None = None,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> BudgetAnswer | SizesAnswer:
    """Return what a training budget buys, as `powerplan budget` prints it.

    One of flops, tokens and gpu_hours is the budget; without any it is 20 tokens per active parameter. Without a model
    the question is which model a budget of flops or gpu_hours supports: shapes of the catalogue, each at the size whose
    20 tokens per parameter use the budget up, and what balances them.

    Args:
        model: a catalogue name, a path to a YAML or a config.json, a spec or a config; a list of them; None asks which.
        context: tokens of a sequence, as 65536, "64k" or "8k,64k", or a list of them; "64k" where None, and
            "8k,32k,128k" without a model.
        flops: training FLOPs in all, as 1e21 or "1e21".
        tokens: training tokens, as 3e11 or "300B".
        gpu_hours: hours of one device in all; needs `gpu` or `measured`.
        gpu: the exact name of a device, such as "h100-sxm".
        mfu: the share of the device's dense bf16 peak that training reaches.
        devices: how many devices work at once.
        batch_tokens: tokens of an optimizer step, as "512k".
        lengths: documents of many lengths, packed into sequences of `context` tokens, as `wsfr` takes them.
        measured: a file of `powerplan profile --save`: measured times of mixers in place of estimates.
        mixer: the mixer to put into every layer of every model, such as "power:p=2".
        convention: how FLOPs are counted; Convention() where None.
        dtype: the number format of weights and key/value cache: fp32, bf16, fp16, fp8 or int4. Weights that the file of
            a model quantizes have their own.
        weights_dtype, cache_dtype, state_dtype: that of all weights, of the cache, of recurrent state (fp32) apart.

    Returns:
        The answer: `budget` holds tokens, sequences and FLOPs per token of one model at one context, `rows` those of
        several. Without a model `rows` holds shapes in their sizes, and `balanced` those that a context balances.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name.
        InfeasibleError: without a model, no shape of the catalogue has a size for the budget.

    Examples:
        >>> answer = budget("gpt2-small", "64k", flops=1e21, gpu="h100-sxm", devices=8)
        >>> answer.budget.tokens, round(answer.gpu_hours)
        (229088454035, 702)
        >>> [row.budget.tokens for row in budget("gpt2-small", "8k,64k", flops=1e21).rows]
        [837358010876, 229088454035]
        >>> [(row.shape, row.context, row.budget.tokens) for row in budget(flops=1e21).balanced[:2]]
        [('qwen3-1.7b', 33274, 40258052233), ('gemma-2-2b', 65088, 41275419290)]
    """
    default = CONTEXTS_WITHOUT_MODEL if model is None else DEFAULT_CONTEXT
    contexts = base.read_contexts(default if context is None else context)
    asked = _read(flops, tokens, gpu_hours, gpu, mfu, devices, batch_tokens, measured)
    dtypes = Dtypes(dtype, weights_dtype, cache_dtype, state_dtype)
    if lengths is not None and model is None:
        raise InputError("needs a model", parameter("lengths"))
    base.refuse_measured_documents(lengths, asked.profile)
    documents = None if lengths is None else read_lengths(lengths)
    if model is None:
        from powerplan.answers.sizes import sizes_answer  # The search is imported where it is needed.

        return sizes_answer(
            _total_without_model(asked),
            contexts,
            mixer=mixer,
            convention=convention,
            dtypes=dtypes,
            batch_tokens=asked.batch_tokens,
            throughput=asked.throughput,
        )
    models = base.several_models(model)
    if not models:
        raise InputError("is an empty list; give one model or more, or None to ask which", parameter("model"))
    if len(models) * len(contexts) > MAX_ROWS:
        size = f"{len(models):,} times {len(contexts):,} models and contexts are too many"
        raise InputError(f"{size}; {MAX_ROWS:,} rows are the most", parameter("context"))
    loaded = [base.read_model(one, mixer, contexts, trained=True) for one in models]
    _refuse_repeats([one.spec for one in loaded])
    accountings = [Accounting(one.spec, convention) for one in loaded]
    rows = tuple(_bought(accounting, at, asked, dtypes, documents) for at in contexts for accounting in accountings)
    alone = len(rows) == 1
    notes = [note for one in loaded for note in (one.notes if alone else base.named_notes(one.spec, one.notes))]
    for row in rows:
        found = _time_notes(row, asked)
        notes += found if alone else base.named_notes(row.budget.accounting.spec, found)
    profile, rate = asked.profile, asked.throughput
    if profile is not None and rate is not None and any(row.time and row.time.measured is not None for row in rows):
        notes += filter(None, [profile.elsewhere(rate.peak.name)])
    if not asked.given:
        flops_, tokens_, hours_ = map(parameter, BUDGETS)
        notes.append(f"no budget given: 20 tokens per active parameter assumed; give {flops_}, {tokens_} or {hours_}")
    if alone:
        notes += rows[0].budget.warnings()
    return BudgetAnswer(
        rows=rows, dtypes=dtypes, batch_tokens=asked.batch_tokens, lengths=documents, notes=tuple(notes)
    )


DEFAULT_MFU = parse_share("0.4")
"""The share of the peak that training reaches where none is given."""

BUDGETS = ("flops", "tokens", "gpu_hours")
"""The parameters of which one is the budget."""


class _Asked(NamedTuple):
    """A budget, if one was `given`, and what its time is counted by.

    flops: FLOPs in all. tokens: tokens in all. hours: hours of one device in all. throughput: None without a device.
    """

    given: tuple[str, ...]
    flops: int | None
    tokens: int | None
    hours: Fraction | None
    throughput: Throughput | None
    profile: MeasuredTimes | None
    batch_tokens: int | None


def _read(
    flops: Whole | float | None,
    tokens: Whole | float | None,
    gpu_hours: Whole | float | None,
    gpu: str | Device | None,
    mfu: float | str,
    devices: Whole,
    batch_tokens: Whole | None,
    measured: str | Path | MeasuredTimes | None,
) -> _Asked:
    values = zip(BUDGETS, (flops, tokens, gpu_hours), strict=True)
    given = tuple(parameter(name) for name, value in values if value)
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are one budget twice; give one of them")
    share, count = parse_share(str(mfu), parameter("mfu")), base.read_devices(devices)
    profile, device = base.read_measured(measured), base.read_device(gpu)
    peak = peak_of(device) if device is not None else profile.peak() if profile is not None else None
    of_devices = {
        "gpu_hours": gpu_hours is not None,
        "measured": profile is not None,
        "devices": count > 1,
        "mfu": share != DEFAULT_MFU,
    }
    for name, is_given in of_devices.items():
        if peak is None and is_given:
            raise needs_device(name)
    return _Asked(
        given,
        tokens=optional(parse_count, "tokens", tokens, "a count of tokens"),
        flops=optional(parse_count, "flops", flops, "a count of FLOPs"),
        hours=optional(parse_hours, "gpu_hours", gpu_hours),
        batch_tokens=optional(parse_context, "batch_tokens", batch_tokens),
        throughput=None if peak is None else Throughput(peak, share, count),
        profile=profile,
    )


def _flops_of(hours: Fraction, rate: Throughput) -> Fraction:
    """Return the FLOPs of some device hours; raises InputError where they are out of range."""
    total = hours * 3600 * rate.flops_per_s
    if total > MAX_COUNT:
        raise InputError("more FLOPs than 1e40", parameter("gpu_hours"))
    return total


def _total_without_model(asked: _Asked) -> Fraction:
    """Return the FLOPs of a budget for which a model is sought; raises InputError where it needs one."""
    if asked.tokens is not None:
        which = f"{parameter('flops')} or {parameter('gpu_hours')}"
        raise InputError(f"needs a model; without one the budget is {which}", parameter("tokens"))
    if asked.profile is not None:
        raise InputError("needs a model: a profile has no times of other sizes", parameter("measured"))
    if asked.flops is not None:
        return Fraction(asked.flops)
    if asked.hours is not None and asked.throughput is not None:
        return _flops_of(asked.hours, asked.throughput)
    flops, hours = parameter("flops", "1e21"), f"{parameter('gpu_hours', '1000')} {parameter('gpu', 'h100-sxm')}"
    raise InputError(f"is missing; give one, or a budget to ask which: {flops}, or {hours}", parameter("model"))


def _refuse_repeats(specs: Sequence[ModelSpec]) -> None:
    seen: set[ModelSpec] = set()
    for spec in specs:
        if spec in seen:
            raise InputError(f"{spec.name} is given twice; give each model once", parameter("model"))
        seen.add(spec)


def _bought(accounting: Accounting, context: int, asked: _Asked, dtypes: Dtypes, lengths: Lengths | None) -> Bought:
    """Return what the budget buys of one model at one context."""
    flops = None if asked.flops is None else Fraction(asked.flops)
    tokens, time = asked.tokens, None
    if asked.throughput is not None:
        row = accounting.row(context, dtypes)
        time = training_time(accounting.spec, row, asked.throughput, asked.profile)
        if asked.hours is not None and time.measured is not None:
            tokens = max(1, int(asked.hours * 3600 / Fraction(time.measured)))
        elif asked.hours is not None:
            flops = _flops_of(asked.hours, asked.throughput)
    whole = budget_of(accounting, context, flops=flops, tokens=tokens, dtypes=dtypes)
    if lengths is None:
        return Bought(whole, time)
    masked = budget_of(accounting, context, flops=flops, tokens=tokens, dtypes=dtypes, lengths=lengths)
    return Bought(whole, time, masked)


def _time_notes(row: Bought, asked: _Asked) -> list[str]:
    """Return what a saved profile lacks for the time of a row."""
    if row.time is None or row.time.missing is None:
        return []
    counted = parameter("mfu", f"{float(row.time.throughput.mfu):g}")
    return [f"{row.time.missing.describe()}: time is counted at {counted} instead"]
