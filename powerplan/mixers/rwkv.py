"""RWKV-7: a generalised delta rule with a decay for each key channel."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import ClassVar

from powerplan.mixers.base import SAME, Mixer, Size
from powerplan.mixers.formulas import Form, Formulas
from powerplan.mixers.linear import ChunkedState
from powerplan.mixers.shape import Inherited


class RWKV7(ChunkedState, frozen=True, kw_only=True, tag_field="kind", tag="rwkv7"):
    """RWKV-7's time mix: S = S (diag(w) + a b^T) + v k^T, with decay w, a and b from the data.

    parameters in matmuls: 2mHk + 2mHv, (m + Hk) for each rank of decay and learning rate, (m + Hv) for each rank of
    value residual and output gate; outside: token shifts, key weights, biases of the ranks, the output norm
    state: Hkv, and the last inputs of the time mix and of the channel mix, Hk each (Hk is the hidden size in RWKV)
    state FLOPs per token: 9Hkv: 1 for the decay, and 2 each for S a, (S a) b^T, v k^T and the query
    Chunked (WY form): 4Hkv late + 4Hkv + 2H((2k + v) earlier + 3(k + v) keys) + H solve
    value_rank: left out in the first layer, which has no value residual.
    channel_mix: the FFN of the layer is RWKV's, whose token shift is counted here: m weights, and Hk of state.
    Parameters checked against flash-linear-attention and the 450.77M of RWKV-7 World 0.4B.
    """

    source: ClassVar[str] = (
        "Peng et al. 2025, arXiv 2503.14456, section 4; flash-linear-attention, dplr/naive.py (chunks)"
    )
    letters: ClassVar[str] = "H=heads k=head_dim v=v_head_dim m rw=decay_rank ra=rate_rank rv=value_rank rg=gate_rank"
    decay: ClassVar[str] = "H*k*v"
    update: ClassVar[str] = "4*H*k*v"
    within: ClassVar[str] = "2*H*((2*k + v)*earlier + 3*(k + v)*keys) + H*solve"
    same_as: ClassVar[Mapping[str, str]] = {"v_head_dim": "head_dim"}
    rounded_widths: ClassVar[tuple[str, ...]] = ("decay_rank", "rate_rank", "value_rank", "gate_rank")

    heads: Size
    head_dim: Size = 64
    v_head_dim: Size = SAME
    decay_rank: Size
    rate_rank: Size
    gate_rank: Size
    value_rank: Size | None = None
    channel_mix: bool = True

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited:
        """Return heads of 64 and ranks as flash-linear-attention derives them from the width (layers/rwkv7.py)."""

        def rank(factor: float) -> int:
            return max(32, round(factor * sqrt(hidden) / 32) * 32)

        ranks = {"decay_rank": rank(2.5), "rate_rank": rank(2.5), "gate_rank": rank(5), "value_rank": rank(1.7)}
        remark = "rwkv7 with heads of 64 and the usual ranks: the weights change too"
        return Inherited({"heads": max(1, hidden // 64), **ranks, "channel_mix": False}, (remark,))

    @classmethod
    def one_head(cls, head_dim: int, v_head_dim: int) -> RWKV7:
        """Return one head of these dims; its ranks are 1, as they do not change the state."""
        return cls(heads=1, head_dim=head_dim, v_head_dim=v_head_dim, decay_rank=1, rate_rank=1, gate_rank=1)

    def matmul_formulas(self) -> Formulas:
        return (
            ("projections", "2*m*H*k + 2*m*H*v"),
            ("decay and learning rate", "(rw + ra)*(m + H*k)"),
            ("output gate", "rg*(m + H*v)"),
            ("value residual", "rv*(m + H*v)" if self.value_rank else ""),
        )

    def other_formulas(self) -> Formulas:
        return (
            ("token shifts", "7*m" if self.channel_mix else "6*m"),
            ("key weights", "3*H*k"),
            ("biases", "2*H*k + H*v" if self.value_rank else "2*H*k"),
            ("output norm", "2*H*v"),
        )

    def state_formulas(self) -> Formulas:
        return ((self.describe(), "H*k*v"), ("token shifts", "2*H*k" if self.channel_mix else "H*k"))

    def flops_formulas(self, form: Form) -> Formulas:
        late = "*late" if form == "chunked" else ""
        return self.steps(
            decay_state="" if late else self.decay,
            read_state=self.query + late,
            update_state=self.update,
            query_state=self.query + late,
            within_chunks=self.within if late else "",
        )
