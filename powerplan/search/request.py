"""What a recommendation has to respect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from powerplan.choices import Keep, Side
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError, parameter
from powerplan.hardware import needs_device, peak_of
from powerplan.measured import MeasuredTimes
from powerplan.mixers import Convention
from powerplan.roofline import Roofline
from powerplan.search.choices import FAMILIES, NAMED_KINDS
from powerplan.search.layer_plan import LayerPlan
from powerplan.search.limits import Limits

MIX = "mix"
"""The word of `--only` and `--exclude` for plans with two kinds of layers."""

SELECTABLE = (*FAMILIES, MIX, *NAMED_KINDS)
"""What `--only` and `--exclude` take."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a recommendation has to respect.

    contexts: in tokens. The worst of them decides; limits, windows and state refer to the longest.
    target: the weight-state FLOP ratio that is wanted. limits: what every candidate must meet.
    only, exclude: words of SELECTABLE. prefer: the side that should be the heavier one, where one must be.
    keep: "weights" leaves width, depth and FFN as they are; "flops" resizes every candidate to the FLOPs per token of
        the model as it is.
    convention, dtypes: how costs are counted, and the dtypes of weights, cache and recurrent state.
    profile: measured times of mixers, in place of rooflines. top: how many candidates are returned at most, the best of
        their sorts.
    """

    contexts: Sequence[int]
    target: Fraction = Fraction(1)
    limits: Limits = field(default_factory=Limits)
    only: Sequence[str] = ()
    exclude: Sequence[str] = ()
    prefer: Side | None = None
    keep: Keep = "weights"
    convention: Convention = field(default_factory=Convention)
    dtypes: Dtypes = field(default_factory=Dtypes)
    profile: MeasuredTimes | None = None
    top: int = 6

    def admits(self, plan: LayerPlan) -> bool:
        """Whether `only` and `exclude` leave a plan."""
        named = set(self.only) - {MIX}
        if MIX in self.exclude and plan.is_mix:
            return False
        if self.only and not named and not plan.is_mix:
            return False
        return (not named or plan.families <= named) and not plan.families & set(self.exclude)

    def check(self) -> None:
        """Raise InputError where the request contradicts itself."""
        if both := ", ".join(sorted(set(self.only) & set(self.exclude))):
            raise InputError(f"{both} is asked for and excluded", f"{parameter('only')}, {parameter('exclude')}")
        limits = self.limits
        if limits.device is None:
            runs = ("max_days", "gpu_hours", "price")
            given = [name for name in runs if getattr(limits, name) is not None]
            for name in [*given, *(["devices"] if limits.devices > 1 else [])]:
                raise needs_device(name)
            if limits.tokens is not None and limits.flops is None:
                raise InputError(f"needs the budget that they must fit; add {parameter('flops')}", parameter("tokens"))

    def roofline(self) -> Roofline | None:
        """Return what gives times: the device that is named, or the one that the profile was measured on."""
        device, profile = self.limits.device, self.profile
        peak = peak_of(device) if device else profile.peak() if profile else None
        return Roofline(peak, profile) if peak else None
