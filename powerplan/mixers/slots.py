"""States of several parts: the slots of gated slot attention, the partitions of sparse state expansion."""

from __future__ import annotations

from typing import ClassVar, Literal

from powerplan.mixers.formulas import Formulas
from powerplan.mixers.linear import MatrixState
from powerplan.part import Size, problem


class GSA(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="gsa"):
    """Gated slot attention: M slots of keys and values per head, forgotten and written by gates, read by softmax.

    parameters in matmuls: m(2Hk + Hv) + Hvm + mHM      state: HM(k + v)
    state FLOPs per token: 5HM(k + v), one of them the decay. Chunked, two passes of gated linear attention:
    2HM(k + v) late + 2HM(k + v) + 2H(k + 2M + v) keys
    Parameters checked against flash-linear-attention.

    slots: slots of memory per head, each a key and a value.
    """

    source = "Zhang et al. 2024, arXiv 2409.07146, section 3 (two passes of GLA); flash-linear-attention"
    letters = MatrixState.letters + " M=slots"
    state = "H*M*(k + v)"
    decay = "H*M*(k + v)"
    transition = "H*M"
    query = "2*H*M*(k + v)"
    update = "2*H*M*(k + v)"
    state_again = update
    within = "2*H*(k + 2*M + v)*keys"

    slots: Size = 64
    output_gate: bool = False
    output_norm: Literal["none", "head", "full"] = "full"

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("forget gate", "m*H*M"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("forget gate", "1", "H*M", "m"))

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

    partitions: partitions of the state, beside the shared one.
    top_k: partitions that a token reads and writes.
    gate_rank: rank of the two projections that make each decay gate.
    """

    source = "Pan et al. 2025, arXiv 2507.16577, section 3; parameters from a public re-implementation"
    letters = MatrixState.letters + " B=partitions chosen=top_k u=gate_rank"
    state = "(1 + B)*H*k*v"
    touched = "(1 + chosen)*H*k*v"
    decay = "(1 + chosen)*H*k*v"
    transition = "(1 + B)*H*k"
    query = "2*(1 + chosen)*H*k*v"
    update = "2*(1 + chosen)*H*k*v"
    state_again = update
    within = "2*(1 + chosen)*H*(k + v)*keys"
    gate = "m*v + v*H*v"
    gate_shapes: ClassVar[tuple[tuple[str, str], ...]] = (("v", "m"), ("H*v", "v"))

    partitions: Size = 4
    top_k: Size = 1
    gate_rank: Size = 16

    def check(self) -> None:
        if self.top_k > self.partitions:
            raise problem("top_k", f"top_k {self.top_k} is more than the {self.partitions} partitions there are")

    def matmul_formulas(self) -> Formulas:
        return (
            *super().matmul_formulas(),
            ("queries and keys of partitions", "2*(m*v + v*H*k)"),
            ("decay gates", "2*(m*u + u*H*k)"),
            ("router", "m*B"),
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (
            *super().matrix_formulas(idle),
            ("queries and keys of partitions", "2", "v", "m"),
            ("queries and keys of partitions", "2", "H*k", "v"),
            ("decay gates", "2", "u", "m"),
            ("decay gates", "2", "H*k", "u"),
            ("router", "1", "B", "m"),
        )

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("biases", "2*H*k"))

    def flops_formulas(self, chunked: bool) -> Formulas:
        if not chunked:
            return super().flops_formulas(chunked)
        query = "2*H*k*v*(late + chosen)"
        return self.steps(query_state=query, update_state=self.update, within_chunks=self.within)

    def describe(self) -> str:
        return f"sse, {self.top_k} of {self.partitions:,}"
