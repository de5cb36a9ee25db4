"""Times of a candidate: the roofline of a device, max(FLOPs / peak, bytes / bandwidth), or measured times.

A lower bound: no kernel reaches it. Training: 3 passes over one sequence, each with the FLOPs of the forward pass and
the weights and the state moved once. Decoding: one token at batch 1 at the end of the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from powerplan.accounting import Row
from powerplan.budget import TRAINING
from powerplan.hardware import Peak
from powerplan.measured import Profile, Unmeasured
from powerplan.mixers.base import total
from powerplan.spec import ModelSpec


@dataclass(frozen=True)
class Times:
    """Seconds per token. measured: whether the mixers' part of training was; missing: what the profile lacks."""

    train: float
    decode: float
    measured: bool = False
    missing: Unmeasured | None = None


@dataclass(frozen=True)
class Roofline:
    """What a device can do at most, in FLOP/s and bytes/s; with a profile, what its mixers were seen to take."""

    peak: Peak
    profile: Profile | None = None

    def of(self, flops: Fraction, moved: Fraction) -> Fraction:
        """Return the roofline time of work that takes `flops` and moves `moved` bytes, in seconds."""
        return max(flops / self.peak.flops_per_s, moved / self.peak.bytes_per_s)

    def times(self, spec: ModelSpec, row: Row) -> Times:
        """Return the times of a model at `row`."""
        context = row.context
        weights, state = row.decode_weight_bytes, row.state_bytes
        last = row.weight_flops + sum(
            Fraction(total(use.layer.mixer.decode_flops_terms(context))) * use.count
            for use in spec.layer_uses()
            if use.layer.mixer is not None
        )
        decode = float(self.of(Fraction(last), weights + row.decode_state_bytes))
        flops = TRAINING * (row.weight_flops + row.state_flops)
        train = float(self.of(Fraction(flops), TRAINING * (weights + state) / context))
        if self.profile is None:
            return Times(train, decode)
        measured = self._measured(spec, context)
        if isinstance(measured, Unmeasured):
            return Times(train, decode, missing=measured)
        part = float(self.of(Fraction(TRAINING * row.weight_flops), TRAINING * weights / context))
        return Times(part + measured, decode, measured=True)

    def _measured(self, spec: ModelSpec, context: int) -> float | Unmeasured:
        assert self.profile is not None
        seconds = 0.0
        for use in spec.layer_uses():
            if use.layer.mixer is not None:
                timing = self.profile.training_time(use.layer.mixer, context)
                if isinstance(timing, Unmeasured):
                    return timing
                seconds += timing.seconds * use.count
        return seconds
