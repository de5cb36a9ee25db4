"""Times of a model's tokens: the roofline of a device, max(FLOPs / peak, bytes / bandwidth), or measured times.

A roofline is a lower bound: no kernel reaches it. Training takes three passes over one sequence, each with the FLOPs of
the forward pass, and moves the weights and the state once in each. Decoding takes one token at batch 1 at the end of
the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from powerplan.accounting import Row
from powerplan.hardware import Peak
from powerplan.measured import MeasuredTimes, Unmeasured
from powerplan.mixers.formulas import total
from powerplan.spec import ModelSpec
from powerplan.training import TRAINING_PASSES


@dataclass(frozen=True)
class TokenTimes:
    """Seconds per token of training and of decoding, on one device.

    measured: the mixers' part of training was measured. missing: the mixer that had no measured time.
    """

    train: float
    decode: float
    measured: bool = False
    missing: Unmeasured | None = None


@dataclass(frozen=True)
class Roofline:
    """The peak rates of a device and, where there is a saved profile, what mixers were measured to take on it."""

    peak: Peak
    profile: MeasuredTimes | None = None

    def times(self, spec: ModelSpec, row: Row) -> TokenTimes:
        """Return the times of a model at the context of `row`."""
        context, weights = row.context, row.decode_weight_bytes_per_token
        state_flops = sum(total(mixer.decode_flops_terms(context)) * count for mixer, count in spec.mixer_counts())
        decode_flops = Fraction(row.weight_flops_per_token + state_flops)
        decode = float(self.peak.roofline_s(decode_flops, weights + row.decode_state_bytes_per_token))
        mixers = self.profile.model_training_time(spec, context) if self.profile else None
        if isinstance(mixers, float):
            train = self._training_s(row.weight_flops_per_token, weights, context) + mixers
            return TokenTimes(train, decode, measured=True)
        train = self._training_s(row.flops_per_token, weights + row.state_bytes, context)
        return TokenTimes(train, decode, missing=mixers)

    def _training_s(self, flops: Fraction | int, moved_bytes: Fraction, context: int) -> float:
        """Return the seconds per token of three passes, with FLOPs per token and bytes per sequence of one pass."""
        moved = Fraction(TRAINING_PASSES * moved_bytes / context)
        return float(self.peak.roofline_s(Fraction(TRAINING_PASSES * flops), moved))
