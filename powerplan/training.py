"""What a training budget buys: FLOPs to tokens, sequences, steps and days, and what other mixers would make of it.

Training takes 3 times the forward FLOPs of docs/accounting.md: the backward pass takes twice the forward pass, and
recomputation is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from powerplan.accounting import Accounting, Row
from powerplan.dtypes import Dtypes
from powerplan.hardware import Peak
from powerplan.lengths import Lengths
from powerplan.lengths.flops import DocumentRow
from powerplan.measured import MeasuredTimes, Unmeasured
from powerplan.mixers.formulas import Rational, integer_if_whole
from powerplan.spec import ModelSpec
from powerplan.swap import Swap, swapped
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.windows import balanced_window, cache_context, can_swap, held_elements, same_state_window
from powerplan.units import format_figure

TRAINING_PASSES = 3
"""Training FLOPs per forward FLOP."""

TOKENS_PER_PARAMETER = 20
"""Training tokens per active parameter that are compute-optimal (Hoffmann et al. 2022, arXiv 2203.15556, Table 3)."""

RULE = "about 20 tokens per parameter are compute-optimal (Hoffmann et al. 2022, arXiv 2203.15556)"

FAR_FROM_RULE = 4
"""Factor from the rule at which a warning is due: to either side, the loss at equal FLOPs is then clearly worse."""


@dataclass(frozen=True)
class Throughput:
    """How fast training runs: a device, the share of its peak that is reached (MFU), and how many work at once."""

    peak: Peak
    mfu: Fraction
    devices: int = 1

    @property
    def flops_per_s(self) -> Fraction:
        """FLOP/s of one device."""
        return self.peak.flops_per_s * self.mfu


@dataclass(frozen=True)
class Budget:
    """A training budget in FLOPs, put into tokens of one model at one context.

    documents: where tokens attend within their documents, what these take in place of whole sequences.
    """

    accounting: Accounting
    row: Row
    total_flops: Fraction
    documents: DocumentRow | None = None

    @property
    def train_flops_per_token(self) -> Fraction:
        return train_flops(self.row if self.documents is None else self.documents)

    @property
    def tokens(self) -> int:
        """Whole tokens that the budget buys."""
        return int(self.total_flops // self.train_flops_per_token)

    @property
    def sequences(self) -> int:
        """Whole sequences of the context."""
        return self.tokens // self.row.context

    def steps(self, batch_tokens: int) -> int:
        """Return the optimizer steps of `batch_tokens` each, the last one perhaps short."""
        return -(-self.tokens // batch_tokens)

    @property
    def parameters(self) -> int:
        """Active parameters, embeddings included: the rule of 20 tokens refers to them."""
        return self.accounting.active_parameters.with_embeddings

    @property
    def tokens_per_parameter(self) -> Fraction:
        return Fraction(self.tokens, self.parameters)

    def warnings(self) -> list[str]:
        """Return what is odd about this budget for this model, in a sentence each."""
        short = f"the budget does not buy one sequence of {self.row.context:,} tokens"
        warnings = [] if self.sequences else [short]
        figure = f"{format_figure(self.tokens_per_parameter)} tokens per active parameter"
        if self.tokens_per_parameter * FAR_FROM_RULE < TOKENS_PER_PARAMETER:
            warnings.append(f"{figure} are few: {RULE}; a smaller model would learn more")
        elif self.tokens_per_parameter > TOKENS_PER_PARAMETER * FAR_FROM_RULE:
            remark = "a bigger model would learn more, this one is cheaper to serve"
            warnings.append(f"{figure} are many: {RULE}; {remark}")
        return warnings


def train_flops(row: Row | DocumentRow) -> Fraction:
    """Return the training FLOPs per token at `row`."""
    return TRAINING_PASSES * row.flops_per_token


@lru_cache(2**16)
def document_flops(accounting: Accounting, tokens: int) -> Rational:
    """Return the training FLOPs of one document of `tokens` tokens, which attends to itself alone.

    It is kept between calls: packed documents of a training run have the same lengths again and again.
    """
    flops = TRAINING_PASSES * tokens * (accounting.weight_flops_per_token + accounting.state_flops_per_token(tokens))
    return integer_if_whole(flops)


def budget_of(
    accounting: Accounting,
    context: int,
    *,
    flops: Fraction | None = None,
    tokens: int | None = None,
    dtypes: Dtypes | str = "bf16",
    lengths: Lengths | None = None,
) -> Budget:
    """Return the budget of `flops`, or of `tokens`; of 20 tokens per active parameter where neither is given.

    lengths: documents that attend to themselves alone, packed into sequences of the context; None for whole sequences.
    """
    row = accounting.row(context, dtypes)
    documents = None if lengths is None else DocumentRow(accounting, lengths, context)
    if flops is None:
        tokens = tokens or TOKENS_PER_PARAMETER * accounting.active_parameters.with_embeddings
        flops = tokens * train_flops(documents or row)
    return Budget(accounting, row, Fraction(flops), documents)


@dataclass(frozen=True)
class Alternative:
    """The same total FLOPs with another mixer in every layer.

    swap: the other mixer; None for the model as it is.
    same_state_window, same_state_context: the window, and the context of the model as it is, whose keys and values have
        as many elements as this recurrent state; None where there is none.
    masked: the same FLOPs where tokens attend within their documents; None where there are none.
    """

    swap: Swap | None
    budget: Budget
    same_state_window: int | None
    same_state_context: int | None
    masked: Budget | None = None


def alternatives(budget: Budget, dtypes: Dtypes | str = "bf16", masked: Budget | None = None) -> list[Alternative]:
    """Return the model as it is, then softmax, the balanced window, power of degree 2 and 3, and linear attention.

    All have the same total FLOPs and, as far as heads allow (MLA), the same weights. Models with a mixer that no other
    can replace stand alone. masked: the budget over documents; the others then have its FLOPs over them too.
    """
    base, context = budget.accounting, budget.row.context
    alternatives = [Alternative(None, budget, same_state_window(base.spec), None, masked)]
    for swap in _swaps(base, context) if can_swap(base.spec) else ():
        spec, _ = swapped(base.spec, swap)
        accounting = Accounting(spec, base.convention)
        row = accounting.row(context, dtypes)
        window = same_state_window(spec)
        held = sum(held_elements(mixer, context) * count for mixer, count in spec.mixer_counts())
        same_context = cache_context(base.spec, held) if window is not None else None
        own = Budget(accounting, row, budget.total_flops)
        over = None
        if masked is not None and masked.documents is not None:
            documents = DocumentRow(accounting, masked.documents.lengths, context)
            over = Budget(accounting, row, masked.total_flops, documents)
        alternatives.append(Alternative(swap, own, window, same_context, over))
    return alternatives


def _swaps(base: Accounting, context: int) -> list[Swap]:
    mixers, heads = base.spec.mixers(), replacement_heads(base.spec)
    swaps = [] if all(mixer.keeps_every_key for mixer in mixers) else [Swap("attention")]
    if window := balanced_window(base.spec, context, base.convention):
        swaps.append(Swap.attention(heads, window))
    if not all(mixer.degree == 2 for mixer in mixers):
        swaps.append(Swap.power(2, heads))
    return [*swaps, Swap.power(3, heads), Swap.of("linear", heads)]


@dataclass(frozen=True)
class TrainingTime:
    """How the time of a budget is found: by the throughput, where no seconds per token were measured.

    measured: seconds of one device per training token, where a saved profile has the times of all mixers; their source
    is its file and device. missing: what the saved profile lacks.
    """

    throughput: Throughput
    measured: float | None = None
    source: str | None = None
    missing: Unmeasured | None = None

    def device_seconds(self, budget: Budget) -> float:
        """Return the seconds of one device for the whole budget."""
        estimate = float(budget.total_flops / self.throughput.flops_per_s)
        return estimate if self.measured is None else self.measured * budget.tokens

    def gpu_hours(self, budget: Budget) -> float:
        """Return the hours of one device for the whole budget."""
        return self.device_seconds(budget) / 3600

    def days(self, budget: Budget) -> float:
        """Return the days of the whole budget on all devices at once."""
        return self.device_seconds(budget) / 86400 / self.throughput.devices


@dataclass(frozen=True)
class Bought:
    """What a budget buys, and how its time is found; no time without a device.

    masked: what it buys where tokens attend within their documents; None where there are none.
    """

    budget: Budget
    time: TrainingTime | None
    masked: Budget | None = None

    @property
    def gpu_hours(self) -> float | None:
        """Hours of one device that the budget takes; None without a device."""
        return None if self.time is None else self.time.gpu_hours(self.budget)


def training_time(spec: ModelSpec, row: Row, throughput: Throughput, profile: MeasuredTimes | None) -> TrainingTime:
    """Return how long training takes: mixers as measured, and weights at the throughput."""
    if profile is None:
        return TrainingTime(throughput)
    mixers = profile.model_training_time(spec, row.context)
    if isinstance(mixers, Unmeasured):
        return TrainingTime(throughput, source=profile.label, missing=mixers)
    weights = float(TRAINING_PASSES * row.weight_flops_per_token / throughput.flops_per_s)
    return TrainingTime(throughput, mixers + weights, profile.label)
