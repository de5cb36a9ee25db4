"""The gated short convolution of LFM2: a mixer whose only state is the last inputs of the convolution."""

from __future__ import annotations

from typing import ClassVar

from powerplan.mixers.base import Inherited, Mixer
from powerplan.mixers.formulas import Formulas
from powerplan.part import Size, Width


class ShortConvolution(Mixer, frozen=True, kw_only=True, tag_field="kind", tag="short_conv"):
    """Gated short convolution: I channels, gated before and after a causal depthwise convolution of W tokens.

    parameters in matmuls: 3mI (the channels and two gates) + WI + Im      state: (W - 1)I, the last inputs
    state FLOPs per token: 0, as the convolution counts as weights
    Checked against transformers' LFM2, whose cache has room for W inputs, not W - 1.

    inner_size: channels of the convolution.
    conv_size: tokens that the convolution spans.
    bias: of both projections and of the convolution, 3I + I + m.
    """

    source = "LFM2, transformers 5.23, modeling_lfm2.py, Lfm2ShortConv"
    letters = "I=inner_size W=conv_size m"
    whole_widths: ClassVar[tuple[str, ...]] = ("inner_size",)

    inner_size: Size
    conv_size: Width = 3
    bias: bool = False

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited:
        return Inherited({"inner_size": hidden}, ("short_conv as wide as the model: the weights change too",))

    def direct_reach(self, context: int) -> int:
        """Return the tokens that one output of the convolution is made of."""
        return min(context, max(1, self.conv_size))

    def matmul_formulas(self) -> Formulas:
        return (("projections", "3*m*I + I*m"), ("short convolutions", "W*I"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return ("projections", "1", "3*I", "m"), ("projections", "1", "m", "I")

    def other_formulas(self) -> Formulas:
        return (("biases", "4*I + m" if self.bias else ""),)

    def state_formulas(self) -> Formulas:
        return ((self.describe(), "0"), ("short convolutions", "(W - 1)*I" if self.conv_size else ""))

    def flops_formulas(self, chunked: bool) -> Formulas:
        return ((self.describe(), "0"),)

    def describe(self) -> str:
        return "short convolution"
