"""States of several parts: the slots of gated slot attention, the partitions of sparse state expansion."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from powerplan.mixers.base import Size, StateSize, problem
from powerplan.mixers.formulas import Convention, Rational, Term, term
from powerplan.mixers.linear import MatrixState


class GSA(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="gsa"):
    """Gated slot attention: M slots of keys and values per head, forgotten and written by gates, read by softmax.

    parameters in matmuls: m(2Hk + Hv) + Hvm + mHM      state: HM(k + v)
    state FLOPs per token: 5HM(k + v), one of them the decay. Chunked, two passes of gated linear attention:
    2HM(k + v) late + 2HM(k + v) + 2H(k + 2M + v) keys
    Parameters checked against flash-linear-attention.
    """

    source: ClassVar[str] = "Zhang et al. 2024, arXiv 2409.07146, section 3 (two passes of GLA); flash-linear-attention"
    state_formula: ClassVar[str] = "H*M*(k + v)"

    slots: Size = 64
    output_gate: bool = False
    output_norm: Literal["none", "head", "full"] = "full"

    def symbols(self, hidden: int = 0) -> dict[str, Rational]:
        return super().symbols(hidden) | {"M": self.slots}

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().matmul_terms(hidden), term("forget gate", "m*H*M", self.symbols(hidden)))

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        touch = "2*H*M*(k + v)"
        if convention.form == "chunked":
            return self.chunked_terms(context, convention, touch, touch, "2*H*(k + 2*M + v)*keys")
        return self.recurrent_terms(decay_state="H*M*(k + v)", query_state=touch, update_state=touch)

    def describe(self) -> str:
        return f"gsa, {self.slots} slots"


class SparseStateExpansion(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="sse"):
    """Sparse state expansion over gated linear attention: one shared state and B partitions of the same size.

    A token reads and writes the shared state and `top_k` of the partitions (`chosen` in the formulas).

    parameters in matmuls: m(2Hk + Hv) + Hvm; low-rank queries and keys of the partitions 2(mv + vHk), two decay gates
    2(mu + uHk), output gate mv + vHv, router mB; the decay gates have 2Hk biases      state: (1 + B)Hkv
    state FLOPs per token: 5(1 + chosen)Hkv, one of them the decay; a partition that is not chosen costs nothing
    Chunked: 2Hkv(late + chosen) + 2(1 + chosen)(Hkv + H(k + v) keys), as if each partition's tokens filled its chunks.
    Not checked against the authors' code, which is not public. The layer follows a re-implementation on
    flash-linear-attention (SSEGLA); its gated DeltaNet variant is not supported.
    """

    source: ClassVar[str] = "Pan et al. 2025, arXiv 2507.16577, section 3; parameters from a public re-implementation"
    state_formula: ClassVar[str] = "(1 + B)*H*k*v"

    partitions: Size = 4
    top_k: Size = 1
    gate_rank: Size = 16

    def check(self) -> None:
        if self.top_k > self.partitions:
            raise problem("top_k", f"top_k {self.top_k} is more than the {self.partitions} partitions there are")

    def symbols(self, hidden: int = 0) -> dict[str, Rational]:
        return super().symbols(hidden) | {"B": self.partitions, "chosen": self.top_k, "u": self.gate_rank}

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        symbols = self.symbols(hidden)
        return (
            *super().matmul_terms(hidden),
            term("queries and keys of partitions", "2*(m*v + v*H*k)", symbols),
            term("decay gates", "2*(m*u + u*H*k)", symbols),
            term("router", "m*B", symbols),
        )

    def output_gate_term(self, hidden: int) -> Term:
        return term("output gate", "m*v + v*H*v", self.symbols(hidden))

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().other_terms(hidden), term("biases", "2*H*k", self.symbols(hidden)))

    def state_size(self, context: int) -> StateSize:
        touched = (1 + self.top_k) * self.heads * self.head_dim * self.v_head_dim
        return replace(super().state_size(context), touched=touched)

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        if convention.form == "recurrent":
            twice = "2*(1 + chosen)*H*k*v"
            return self.recurrent_terms(decay_state="(1 + chosen)*H*k*v", query_state=twice, update_state=twice)
        symbols = self.symbols() | self.chunk_symbols(context, convention)
        return self.step_terms(
            symbols,
            query_state="2*H*k*v*(late + chosen)",
            update_state="2*(1 + chosen)*H*k*v",
            within_chunks="2*(1 + chosen)*H*(k + v)*keys",
        )

    def describe(self) -> str:
        return f"sse, {self.top_k} of {self.partitions:,}"
