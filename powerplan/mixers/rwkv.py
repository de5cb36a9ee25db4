"""RWKV-7: a generalised delta rule with a decay for each key channel."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import ClassVar

from powerplan.mixers.base import SAME, Size
from powerplan.mixers.formulas import Convention, Rational, Term, term
from powerplan.mixers.heads import plain_heads_of
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

    def whole_widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def plain_heads(self, kind: str) -> Inherited:
        return plain_heads_of(self, kind)

    @classmethod
    def from_hidden_size(cls, hidden: int) -> Inherited:
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

    def symbols(self, hidden: int = 0) -> dict[str, Rational]:
        letters: dict[str, Rational] = {"H": self.heads, "k": self.head_dim, "v": self.v_head_dim, "m": hidden}
        return letters | {"rw": self.decay_rank, "ra": self.rate_rank, "rv": self.value_rank or 0, "rg": self.gate_rank}

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        symbols = self.symbols(hidden)
        terms = (
            term("projections", "2*m*H*k + 2*m*H*v", symbols),
            term("decay and learning rate", "(rw + ra)*(m + H*k)", symbols),
            term("output gate", "rg*(m + H*v)", symbols),
        )
        return (*terms, term("value residual", "rv*(m + H*v)", symbols)) if self.value_rank else terms

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        symbols = self.symbols(hidden)
        return (
            term("token shifts", "7*m" if self.channel_mix else "6*m", symbols),
            term("key weights", "3*H*k", symbols),
            term("biases", "2*H*k + H*v" if self.value_rank else "2*H*k", symbols),
            term("output norm", "2*H*v", symbols),
        )

    def state_terms(self, context: int) -> tuple[Term, ...]:
        symbols = self.symbols()
        shifts = "2*H*k" if self.channel_mix else "H*k"
        return (term(self.describe(), "H*k*v", symbols), term("token shifts", shifts, symbols))

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        read, update = "2*H*k*v", "4*H*k*v"
        if convention.form == "recurrent":
            return self.recurrent_terms(decay_state="H*k*v", read_state=read, update_state=update, query_state=read)
        return self.step_terms(
            self.symbols() | self.chunk_symbols(context, convention),
            read_state=f"{read}*late",
            update_state=update,
            query_state=f"{read}*late",
            within_chunks="2*H*((2*k + v)*earlier + 3*(k + v)*keys) + H*solve",
        )

    def describe(self) -> str:
        return "rwkv7"
