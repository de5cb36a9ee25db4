"""Hyena: long convolutions with implicit filters, gated; as FFTs, from a cache of inputs, or as a distilled state."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, ClassVar

import msgspec

from powerplan.mixers.base import Inherited, Mixer
from powerplan.mixers.formulas import Convention, Formulas, Rational, mean_keys
from powerplan.mixers.state_size import StateSize
from powerplan.part import Size, Width, Window, problem


class Hyena(Mixer, frozen=True, kw_only=True, tag_field="kind", tag="hyena"):
    """The Hyena operator: `order` gates and order - 1 long convolutions between them, on I channels.

    The order is that of the authors' code: order + 1 projections, order - 1 long convolutions; the recurrence of the
    paper has one convolution more.
    parameters in matmuls: (order + 1)mI + Im + W(order + 1)I. A small network makes the filters from features of the
    position, once for all sequences of a batch: its weights count as parameters, its FLOPs and the filter's FFT do not.
    Decoding, the recurrent form, by the cached inputs of the convolutions: state I(order - 1)t, and 2I(order - 1) keys
    FLOPs per token. Every decoded token reads all of the cache, and the filter, which all sequences share and which is
    not counted. With `state_dim` S, the filters are distilled (LaughingHyena) into S/2 complex modes per channel: state
    I(order - 1)S, and 5I(order - 1)S FLOPs: 3 to decay (6 for a complex product), 2 to query; inputs are added.
    Chunked: FFTs of the least power of two of at least 2t points. One takes 5 n log2 n FLOPs, of real numbers half.
    Two of them and n/2 complex products are I(order - 1)(5 points bits + 3 points) per token.
    Both forms keep the last inputs of the short convolution, (W - 1)(order + 1)I.

    inner_size: channels of the convolutions, as many as the model has features.
    order: gates of the operator.
    conv_size: tokens that the short convolution of the projections spans.
    filter_width: width of the network that makes the filters.
    filter_layers: its layers of filter_width x filter_width.
    position_features: features of a position that it reads.
    filter_length: tokens of a learned table of these features; left out where they are not learned.
    state_dim: numbers of state per channel and convolution of the distilled form, two for each mode; null for a cache.
    bias: of both projections and of the short convolution.
    """

    source = (
        "Poli et al. 2023, arXiv 2302.10866, section 3; safari, src/models/sequence/hyena.py; Massaroli et al. 2023, "
        "arXiv 2310.18780 (distilled)"
    )
    letters = "I=inner_size order=order W=conv_size S=state_dim e=position_features y=filter_width j=filter_layers"
    letters += " K=filter_length m"
    chunked_differs = True
    whole_widths: ClassVar[tuple[str, ...]] = ("inner_size",)

    inner_size: Size
    order: Annotated[int, msgspec.Meta(ge=2, le=16)] = 2
    conv_size: Width = 3
    filter_width: Size = 64
    filter_layers: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2
    position_features: Size = 5
    filter_length: Window | None = None
    state_dim: Size | None = None
    bias: bool = True

    def check(self) -> None:
        if self.state_dim and self.state_dim % 2:
            raise problem("state_dim", f"a mode has 2 numbers, and state_dim is {self.state_dim}")

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited:
        remark = (
            "hyena as wide as the model: the weights change too; --form recurrent counts it as in decoding, --form "
            "chunked by FFTs, as in training"
        )
        return Inherited({"inner_size": hidden}, (remark,))

    @property
    def entry(self) -> str:  # type: ignore[override]
        return "" if self.state_dim else "I*(order - 1)"

    @property
    def keeps_every_key(self) -> bool:
        """It keeps inputs of convolutions, and no keys."""
        return False

    def matmul_formulas(self) -> Formulas:
        return ("projections", "(order + 1)*m*I + I*m"), ("short convolutions", "W*(order + 1)*I")

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return ("projections", "1", "(order + 1)*I", "m"), ("projections", "1", "m", "I")

    def other_formulas(self) -> Formulas:
        convolved = " + (order + 1)*I" if self.conv_size else ""
        return (
            ("filter network", "e*y + y + j*(y*y + y) + y + y*(order - 1)*I"),
            ("filter biases", "(order - 1)*I"),
            ("position features", "K*e" if self.filter_length else ""),
            ("biases", f"(order + 1)*I + m{convolved}" if self.bias else ""),
        )

    def state_formulas(self) -> Formulas:
        held = "S" if self.state_dim else "t"
        recent = "(W - 1)*(order + 1)*I" if self.conv_size else ""
        return (("hyena", f"I*(order - 1)*{held}"), ("short convolutions", recent))

    def state_size(self, context: int) -> StateSize:
        held, *recent = (int(part.value) for part in self.state_terms(context))
        if self.state_dim:
            return StateSize(recurrent=held, recent=sum(recent))
        return StateSize(cache=held, entry=self.inner_size * (self.order - 1), recent=sum(recent))

    def flops_formulas(self, chunked: bool) -> Formulas:
        channels = "I*(order - 1)"
        if chunked:
            return (("hyena: long convolutions", f"{channels}*(5*points*bits + 3*points)"),)
        if self.state_dim:
            return self.steps(decay_state=f"3*{channels}*S", query_state=f"2*{channels}*S")
        return (("hyena: long convolutions", f"2*{channels}*keys"),)

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        if convention.form == "recurrent":
            return {"keys": mean_keys(context, convention.causal)}
        bits = (2 * context - 1).bit_length()
        return {"points": Fraction(2**bits, context), "bits": bits}

    def describe(self) -> str:
        return f"hyena, state {self.state_dim:,}" if self.state_dim else "hyena"
