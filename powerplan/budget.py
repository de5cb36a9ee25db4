"""What a budget buys: FLOPs to tokens, sequences, steps and days, and what other mixers would make of it.

Training takes 3 times the forward FLOPs of docs/accounting.md (backward twice the forward; recomputation not counted).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from powerplan.accounting import Accounting, Row
from powerplan.hardware import Peak
from powerplan.measured import Profile, Unmeasured
from powerplan.mixers import FeatureAttention
from powerplan.spec import ModelSpec
from powerplan.swaps import (
    AS_IS,
    balanced_window,
    cache_context,
    can_swap,
    default_shape,
    is_softmax,
    power_text,
    same_state_window,
    sequence_mixers,
    window_text,
)
from powerplan.swaps import mixer_text as text_of
from powerplan.whatif import with_mixer

TRAINING = 3
"""Training FLOPs per forward FLOP."""

TOKENS_PER_PARAMETER = 20
RULE = "about 20 tokens per parameter are compute-optimal (Hoffmann et al. 2022, arXiv 2203.15556)"
FAR = 4
"""Factor from the rule at which a warning is due: to either side, the loss at equal FLOPs is then clearly worse."""


@dataclass(frozen=True)
class Rate:
    """What turns FLOPs into time: a device, the share of its peak that is reached, and how many work at once."""

    peak: Peak
    mfu: Fraction
    devices: int = 1

    @property
    def flops_per_s(self) -> Fraction:
        """FLOP/s of one device."""
        return self.peak.flops_per_s * self.mfu


@dataclass(frozen=True)
class Budget:
    """A training budget in FLOPs, put into tokens of one model at one context."""

    accounting: Accounting
    row: Row
    total_flops: Fraction

    @property
    def train_flops_per_token(self) -> Fraction:
        return train_flops(self.row)

    @property
    def tokens(self) -> int:
        """Whole tokens that the budget buys."""
        return int(self.total_flops // self.train_flops_per_token)

    @property
    def sequences(self) -> int:
        """Whole sequences of the context."""
        return self.tokens // self.row.context

    def steps(self, batch_tokens: int) -> int:
        """Return the optimiser steps of `batch_tokens` each, the last one perhaps short."""
        return -(-self.tokens // batch_tokens)

    @property
    def parameters(self) -> int:
        """Active parameters, embeddings included: what the tokens are set against."""
        return self.accounting.active_parameters.with_embeddings

    def warnings(self) -> list[str]:
        """Return what is odd about this budget for this model, in a sentence each."""
        found = []
        share = Fraction(self.tokens, self.parameters)
        if not self.sequences:
            found.append(f"the budget does not buy one sequence of {self.row.context:,} tokens")
        if share * FAR < TOKENS_PER_PARAMETER:
            found.append(
                f"{_figure(share)} tokens per active parameter are few: {RULE}; a smaller model would learn more"
            )
        elif share > TOKENS_PER_PARAMETER * FAR:
            found.append(
                f"{_figure(share)} tokens per active parameter are many: {RULE}; a bigger model would learn more, "
                "this one is cheaper to serve"
            )
        return found


def _figure(value: Fraction) -> str:
    return f"{float(f'{float(value):.3g}'):,.10g}"


def train_flops(row: Row) -> Fraction:
    """Return the training FLOPs per token at `row`."""
    return TRAINING * (row.weight_flops + row.state_flops)


def budget_of(
    accounting: Accounting,
    context: int,
    *,
    flops: Fraction | None = None,
    tokens: int | None = None,
    dtype: str = "bf16",
) -> Budget:
    """Return the budget of `flops`, or of `tokens`; 20 tokens per active parameter where neither is given."""
    row = accounting.row(context, dtype)
    if flops is None:
        count = tokens or TOKENS_PER_PARAMETER * accounting.active_parameters.with_embeddings
        flops = count * train_flops(row)
    return Budget(accounting, row, Fraction(flops))


@dataclass(frozen=True)
class Alternative:
    """The same budget with another mixer in every layer: equal total FLOPs, and what has an equal state.

    same_window and same_context: the window and the context whose keys and values have as many elements as this
    recurrent state; None where there is none. s_per_token: training time of a token on one device, where known.
    """

    mixer: str
    budget: Budget
    same_window: int | None
    same_context: int | None


def alternatives(budget: Budget, dtype: str = "bf16") -> list[Alternative]:
    """Return the model as it is, then softmax, the balanced window, power of degree 2 and 3, and linear attention.

    All at the same total FLOPs and, as far as heads allow (MLA), the same weights. Models whose mixers cannot be
    swapped stand alone.
    """
    base, context = budget.accounting, budget.row.context
    found = [Alternative(AS_IS, budget, same_state_window(base.spec), None)]
    if not can_swap(base.spec):
        return found
    for text in _texts(base, context):
        spec, _ = with_mixer(base.spec, text)
        accounting = Accounting(spec, base.convention)
        row = accounting.row(context, dtype)
        window = same_state_window(spec)
        found.append(
            Alternative(
                text,
                Budget(accounting, row, budget.total_flops),
                window,
                cache_context(base.spec, row.state_elements) if window is not None else None,
            )
        )
    return found


def _texts(base: Accounting, context: int) -> list[str]:
    spec = base.spec
    mixers, shape = sequence_mixers(spec), default_shape(spec)
    texts = [] if all(is_softmax(mixer) for mixer in mixers) else ["attention"]
    window = balanced_window(spec, context, base.convention)
    if window is not None:
        texts.append(window_text(window, shape))
    if not all(isinstance(mixer, FeatureAttention) and mixer.degree == 2 for mixer in mixers):
        texts.append(power_text(2, shape))
    return [*texts, power_text(3, shape), text_of("linear", *([shape.setting()] if shape else []))]


@dataclass(frozen=True)
class MeasuredTime:
    """Device time of a training token: mixers as measured, weights at the rate; and what the profile lacks."""

    seconds: float | None
    missing: Unmeasured | None


def measured_time(spec: ModelSpec, row: Row, rate: Rate, profile: Profile) -> MeasuredTime:
    """Return the training time of one token in seconds, with measured times for the state part of every layer."""
    state = 0.0
    for use in spec.layer_uses():
        if use.layer.mixer is not None:
            timing = profile.training_time(use.layer.mixer, row.context)
            if isinstance(timing, Unmeasured):
                return MeasuredTime(None, timing)
            state += timing.seconds * use.count
    return MeasuredTime(state + float(TRAINING * row.weight_flops / rate.flops_per_s), None)
