"""Gated recurrences beside state space models: mLSTM, RG-LRU, and the time mix of RWKV-4."""

from __future__ import annotations

from typing import ClassVar, Literal

from powerplan.mixers.base import Inherited, Mixer
from powerplan.mixers.formulas import Formulas
from powerplan.mixers.linear import MatrixState
from powerplan.part import Size, Width


class MLSTM(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="mlstm"):
    """mLSTM: linear attention with an input and a forget gate per head, and a normaliser n = f n + i k.

    parameters in matmuls: m(2Hk + 2Hv + 2H) + Hvm, the output gate included; the two gates have 2H biases
    state: H(k(v + 1) + 1), the normaliser as one more value, and the running maximum of the gates
    state FLOPs per token: 5Hk(v + 1), one of them the decay. Chunked: 2Hk(v + 1) late + 2Hk(v + 1) + 2H(k + v + 1) keys
    Parameters checked against transformers' xLSTM.

    bias: of every other projection and of the norm, 2Hk + 3Hv + m.
    """

    source = "Beck et al. 2024, arXiv 2405.04517, equations 19 to 27; xLSTM 7B, arXiv 2503.13427, section 3"
    state = "H*(k*(v + 1) + 1)"
    decay = "H*k*(v + 1)"
    transition = "H"
    query = "2*H*k*(v + 1)"
    update = "2*H*k*(v + 1)"
    within = "2*H*(k + v + 1)*keys"

    output_norm: Literal["none", "head", "full"] = "full"
    bias: bool = False

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("gates", "2*m*H"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("gates", "2", "H", "m"))

    def other_formulas(self) -> Formulas:
        gate = "H*v" if self.bias and self.output_gate else ""
        norm = {"none": "", "head": "v", "full": "H*v"}[self.output_norm] if self.bias else ""
        return (
            *super().other_formulas(),
            ("biases", "2*H"),
            ("biases", "2*H*k + H*v + m" if self.bias else ""),
            ("biases", gate),
            ("biases", norm),
        )


class RGLRU(Mixer, frozen=True, kw_only=True, tag_field="kind", tag="rglru"):
    """The recurrent block of Griffin: a short convolution, and a linear recurrence with a gated decay per channel.

    Its channels are I = heads x head_dim. The two gates of the recurrence are products with one k x k block per head.
    parameters in matmuls: 2mI + Im + 2Hkk + WI; biases 2I + m, of the convolution I, of the gates 2I; decay I
    state: I, and (W - 1)I of the convolution
    state FLOPs per token: 3I: 1 for the decay, 2 for the update; the output is the state. A scan does the same work.
    Parameters checked against transformers' RecurrentGemma.

    heads: blocks of channels that the gates of the recurrence work on.
    head_dim: channels of a block.
    conv_size: tokens that the causal depthwise convolution spans; 0 if there is none.
    """

    source = "De et al. 2024, arXiv 2402.19427, section 2.4 (RG-LRU) and equations 1 to 4"
    letters = "I=inner_size H=heads k=head_dim W=conv_size m"
    transition = "I"
    whole_widths: ClassVar[tuple[str, ...]] = ("heads",)

    heads: Size
    head_dim: Size
    conv_size: Width = 4

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited:
        remark = "rglru as wide as the model, with one block in its gates: the weights change too"
        return Inherited({"heads": 1, "head_dim": hidden}, (remark,))

    @classmethod
    def one_head(cls, head_dim: int, v_head_dim: int) -> RGLRU:
        """Return one block of `v_head_dim` channels, each with a state of one number."""
        return cls(heads=1, head_dim=v_head_dim)

    @property
    def inner_size(self) -> int:
        return self.heads * self.head_dim

    def matmul_formulas(self) -> Formulas:
        return (
            ("projections", "2*m*I + I*m"),
            ("gates", "2*H*k*k"),
            ("short convolutions", "W*I"),
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (
            ("projections", "2", "I", "m"),
            ("projections", "1", "m", "I"),
            ("gates", "2*H", "k", "k"),
        )

    def other_formulas(self) -> Formulas:
        return (
            ("biases", "2*I + m + 2*I"),
            ("biases", "I" if self.conv_size else ""),
            ("decay", "I"),
        )

    def state_formulas(self) -> Formulas:
        return ((self.describe(), "I"), ("short convolutions", "(W - 1)*I" if self.conv_size else ""))

    def flops_formulas(self, chunked: bool) -> Formulas:
        return self.steps(decay_state="I", update_state="2*I")

    def describe(self) -> str:
        return "rg-lru"


class RWKV4(Mixer, frozen=True, kw_only=True, tag_field="kind", tag="rwkv4"):
    """RWKV-4's time mix: weighted means of the values over the past, per channel, with a fixed decay.

    Its I channels are the hidden size.
    parameters in matmuls: 3mI + Im; decay and bonus 2I, token shifts 3m
    state: 3I (numerator, denominator, their exponent), and the last inputs of time mix and channel mix, 2I
    state FLOPs per token: 10I, for numerator and denominator: 2I to decay them, 4I to add this token's part, and 4I to
    add it again with its bonus for the output. A scan does the same work.
    Parameters checked against transformers' RWKV.

    inner_size: channels of the time mix.
    channel_mix: the FFN of the layer is RWKV's, whose token shift is counted here: 2m weights, and I of state.
    """

    source = "Peng et al. 2023, arXiv 2305.13048, section 3.1 and appendix D (recurrent form)"
    letters = "I=inner_size m"
    whole_widths: ClassVar[tuple[str, ...]] = ("inner_size",)

    inner_size: Size
    channel_mix: bool = True

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited:
        remark = "rwkv4 as wide as the model: the weights change too"
        return Inherited({"inner_size": hidden, "channel_mix": False}, (remark,))

    @classmethod
    def one_head(cls, head_dim: int, v_head_dim: int) -> RWKV4:
        """Return `v_head_dim` channels."""
        return cls(inner_size=v_head_dim)

    def matmul_formulas(self) -> Formulas:
        return (("projections", "3*m*I + I*m"),)

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return ("projections", "3", "I", "m"), ("projections", "1", "m", "I")

    def other_formulas(self) -> Formulas:
        return (("decay", "2*I"), ("token shifts", "5*m" if self.channel_mix else "3*m"))

    def state_formulas(self) -> Formulas:
        return ((self.describe(), "3*I"), ("token shifts", "2*I" if self.channel_mix else "I"))

    def flops_formulas(self, chunked: bool) -> Formulas:
        return self.steps(decay_state="2*I", update_state="4*I", own_token="4*I")
