"""How a model rotates queries and keys by their positions (RoPE): base, share of a head, scaling to longer contexts.

It changes no count. `powerplan.models` builds it, and reports remark on contexts beyond those a model was trained for.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from powerplan.part import Part, Position, Window, check_in_layers, problem
from powerplan.units import MAX_CONTEXT

MAX_NUMBER = 1e15
"""The largest base or factor. A bound also keeps infinity out."""

Base = Annotated[float, msgspec.Meta(gt=1, le=MAX_NUMBER)]
Factor = Annotated[float, msgspec.Meta(ge=1, le=MAX_NUMBER)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=MAX_NUMBER)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Divisors = Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1, max_length=4096)]


class Scaling(Part, frozen=True, kw_only=True, tag_field="kind"):
    """How the angles are changed for contexts beyond those of the first training."""

    @property
    def kind(self) -> str:
        """The word that names this class in a spec."""
        return str(self.__struct_config__.tag)

    def describe(self) -> str:
        """Return the scaling in words: "8,192 before scaling", or by how much where it does not say from where."""
        original = getattr(self, "original_context", None)
        return f"RoPE scaled by {getattr(self, 'factor', 1):g}" if original is None else f"{original:,} before scaling"

    def reach(self, trained_context: int) -> float:
        """Return the context in tokens that the scaling is made for, given the longest one of the training.

        Files with a linear scaling state the context before it or after it, and do not say which.
        """
        return trained_context

    @property
    def attention_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    @property
    def latent_scale(self) -> float:
        """What the scores of latent attention (`mla`) are multiplied by besides."""
        return 1.0


class LinearScaling(Scaling, frozen=True, kw_only=True, tag="linear"):
    """Positions divided by a factor.

    factor: by how much.
    """

    factor: Factor


class DynamicScaling(Scaling, frozen=True, kw_only=True, tag="dynamic"):
    """A base that grows with the context ("dynamic NTK"), from the original context on.

    factor: how fast it grows.
    original_context: the tokens up to which the base stays.
    """

    factor: Factor
    original_context: Window

    def reach(self, trained_context: int) -> float:
        return self.factor * self.original_context


class YarnScaling(Scaling, frozen=True, kw_only=True, tag="yarn"):
    """YaRN (arXiv 2309.00071): slow angles are divided by the factor, fast ones stay, and those between are mixed.

    factor: by how much the context grows.
    original_context: tokens before scaling.
    beta_fast: turns within the original context from which angles stay.
    beta_slow: turns within it up to which they are divided.
    attention_factor: multiplies cosines and sines; 0.1 ln(factor) + 1 where left out.
    mscale: with mscale_all_dim, DeepSeek's number in place of that.
    mscale_all_dim: the same for what it is divided by; it also multiplies the scores of latent attention.
    truncate: whether the limits between the kinds of angles are whole pairs.
    """

    factor: Factor
    original_context: Window
    beta_fast: Positive = 32
    beta_slow: Positive = 1
    attention_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool = True

    def check(self) -> None:
        if self.beta_fast < self.beta_slow:
            raise problem("beta_fast", f"{self.beta_fast:g} is less than beta_slow {self.beta_slow:g}")

    def reach(self, trained_context: int) -> float:
        return self.factor * self.original_context

    @property
    def attention_scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def latent_scale(self) -> float:
        return self._growth(self.mscale_all_dim or 0.0) ** 2

    def _growth(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0


class Llama3Scaling(Scaling, frozen=True, kw_only=True, tag="llama3"):
    """Llama 3.1: angles that turn slowly within the original context are divided by the factor, those between mixed.

    factor: by how much.
    original_context: tokens before scaling.
    low_freq_factor: turns within the original context up to which angles are divided.
    high_freq_factor: turns within it from which they stay; where both are the same (Llama 4 Scout), none are mixed.
    """

    factor: Factor
    original_context: Window
    low_freq_factor: Positive = 1
    high_freq_factor: Positive = 4

    def check(self) -> None:
        if self.high_freq_factor < self.low_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise problem("high_freq_factor", f"{high:g} is less than low_freq_factor {low:g}")


class LongRopeScaling(Scaling, frozen=True, kw_only=True, tag="longrope"):
    """LongRoPE (arXiv 2402.13753): each pair of features has divisors of its own.

    short_factor: the divisors of contexts up to the original one.
    long_factor: the divisors beyond it.
    original_context: tokens before scaling.
    factor: by how much the context grows.
    attention_factor: multiplies cosines and sines; sqrt(1 + ln(factor) / ln(original_context)) where left out.
    """

    short_factor: Divisors
    long_factor: Divisors
    original_context: Annotated[int, msgspec.Meta(ge=2, le=MAX_CONTEXT)]
    factor: Factor
    attention_factor: Positive | None = None

    def check(self) -> None:
        short, long = len(self.short_factor), len(self.long_factor)
        if short != long:
            raise problem("long_factor", f"has {long} entries, and short_factor {short}")

    @property
    def attention_scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))


class ProportionalScaling(Scaling, frozen=True, kw_only=True, tag="proportional"):
    """Gemma 4: angles as for the whole head, of which the first `partial` turn, divided by a factor.

    factor: by how much.
    """

    factor: Factor = 1


AnyScaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling | LongRopeScaling | ProportionalScaling
SCALINGS: dict[str, type[Scaling]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (LinearScaling, DynamicScaling, YarnScaling, Llama3Scaling, LongRopeScaling, ProportionalScaling)
}
"""The kinds of scaling by their names."""


class Rope(Part, frozen=True, kw_only=True):
    """Rotary position embedding of some layers (Su et al. 2021, arXiv 2104.09864).

    theta: the base of the angles.
    partial: the share of a head's features that are rotated.
    scaling: how angles are changed for longer contexts.
    in_layers: the layers (from 0) that this holds in; all where left out.
    """

    theta: Base = 10_000
    partial: Share = 1
    scaling: AnyScaling | None = None
    in_layers: tuple[Position, ...] | None = None

    def check(self) -> None:
        check_in_layers(self.in_layers)

    def describe(self) -> str:
        """Return the setting in words: "base 500,000, llama3 scaling by 8 (8,192 before scaling)"."""
        parts = [f"base {self.theta:,.6g}" if self.theta % 1 else f"base {self.theta:,.0f}"]
        if self.partial != 1:
            parts.append(f"{self.partial:.4g} of each head")
        if self.scaling is not None:
            original = f" ({self.scaling.describe()})" if hasattr(self.scaling, "original_context") else ""
            parts.append(f"{self.scaling.kind} scaling by {self.scaling.factor:g}{original}")
        return ", ".join(parts)

    def rotated(self, head_dim: int) -> int:
        """Return how many features of a head are rotated, as transformers rounds them."""
        return int(head_dim * self.partial)

    @property
    def attention_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.attention_scale

    @property
    def latent_scale(self) -> float:
        """What the scores of latent attention (`mla`) are multiplied by besides."""
        return 1.0 if self.scaling is None else self.scaling.latent_scale
