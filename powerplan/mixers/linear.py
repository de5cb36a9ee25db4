"""Linear attention with a decay, one matrix of state per head: RetNet, lightning attention, gated linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar, Literal

from powerplan.mixers.base import SAME, Mixer, Size, Width, Window
from powerplan.mixers.formulas import Convention, Formulas, Rational, mean_keys_in_chunks, mean_solve


class RecurrentState(Mixer, frozen=True, kw_only=True):
    """A mixer with a recurrent state, computed token by token or in chunks.

    Chunked: tokens of the first chunk do not query the state, and attention within chunks is added. A decay that
    depends on the data costs 1 FLOP per element of state in the recurrent form, where every token applies it. In the
    chunked form decays are elementwise work on the keys and queries, and not counted.
    decay, query, update, within: formulas of the steps; `within` is attention within chunks.
    """

    chunked_differs = True
    decay = ""
    query = "2*H*k*v"
    update = "2*H*k*v"
    within = "2*H*(k + v)*keys"

    def effective_chunk_size(self) -> int:
        """Return the tokens of a chunk."""
        raise NotImplementedError

    def flops_formulas(self, chunked: bool) -> Formulas:
        if chunked:
            return self.steps(query_state=f"{self.query}*late", update_state=self.update, within_chunks=self.within)
        return self.steps(decay_state=self.decay, query_state=self.query, update_state=self.update)

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        if convention.form == "recurrent":
            return {}
        chunk, causal = self.effective_chunk_size(), convention.causal
        keys = mean_keys_in_chunks(context, causal, chunk)
        return {
            "keys": keys,
            "earlier": keys if causal == "full" else keys - 1,
            "late": Fraction(max(0, context - chunk), context),
            "solve": mean_solve(context, causal, chunk),
        }


class ChunkedState(RecurrentState, frozen=True, kw_only=True):
    """A recurrent state whose chunks have a size that follows from nothing else."""

    chunk_size: Window = 64

    def effective_chunk_size(self) -> int:
        return self.chunk_size


class MatrixState(ChunkedState, frozen=True, kw_only=True):
    """H heads with a state of k x v each, and the projections, convolutions and norms that such layers share.

    parameters in matmuls: m(2Hk + Hv) + Hvm, output gate mHv, short convolutions W(2Hk + Hv)
    output_norm: "head" has v weights, "full" Hv, "none" none.
    conv_size: width of the causal depthwise convolutions on queries, keys and values; 0 if there are none.
    conv_bias: whether these convolutions have biases.
    state: the elements of the state. convolved: the channels of the convolutions. gate: parameters of the output gate.
    """

    letters = "H=heads k=head_dim v=v_head_dim W=conv_size m"
    state = "H*k*v"
    convolved = "2*H*k + H*v"
    gate = "m*H*v"
    gate_shapes: ClassVar[tuple[tuple[str, str], ...]] = (("H*v", "m"),)
    same_as: ClassVar[Mapping[str, str]] = {"v_head_dim": "head_dim"}

    heads: Size
    head_dim: Size
    v_head_dim: Size = SAME
    output_gate: bool = True
    output_norm: Literal["none", "head", "full"] = "head"
    conv_size: Width = 0
    conv_bias: bool = False

    def matmul_formulas(self) -> Formulas:
        return (
            ("projections", f"m*({self.convolved}) + H*v*m"),
            ("output gate", self.gate if self.output_gate else ""),
            ("short convolutions", f"W*({self.convolved})" if self.conv_size else ""),
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        gate = (("output gate", "1", rows, columns) for rows, columns in self.gate_shapes if self.output_gate)
        return (("projections", "1", self.convolved, "m"), ("projections", "1", "m", "H*v"), *gate)

    def other_formulas(self) -> Formulas:
        return (
            ("biases", self.convolved if self.conv_size and self.conv_bias else ""),
            ("output norm", {"none": "", "head": "v", "full": "H*v"}[self.output_norm]),
        )

    def state_formulas(self) -> Formulas:
        recent = f"(W - 1)*({self.convolved})" if self.conv_size else ""
        return ((self.describe(), self.state), ("short convolutions", recent))


class RetNet(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="retnet"):
    """Multi-scale retention: S = gamma S + k v, with a gamma per head that is fixed.

    parameters in matmuls: m(2Hk + 2Hv) + Hvm, the output gate included      state: Hkv elements
    state FLOPs per token: 4Hkv; the fixed decay folds into queries and keys. Chunked: 2Hkv late + 2Hkv + 2H(k + v) keys
    output_norm: none in torchscale, whose group norm has no weights; "head" in flash-linear-attention.
    Parameters checked against both.
    """

    source = "Sun et al. 2023, arXiv 2307.08621, equations 6 to 8; torchscale, multiscale_retention.py"

    output_norm: Literal["none", "head", "full"] = "none"


class Lightning(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="lightning"):
    """Lightning attention (MiniMax-01): linear attention with a fixed decay per head, sigmoid output gate, one norm.

    parameters in matmuls: m(2Hk + 2Hv) + Hvm, the output gate included      state: Hkv elements
    state FLOPs per token: 4Hkv. Chunked: 2Hkv late + 2Hkv + 2H(k + v) keys, chunks of 256
    Checked against transformers' MiniMax.
    """

    source = "Qin et al. 2024, arXiv 2401.04658, algorithm 1; MiniMax-01, arXiv 2501.08313, section 2.2"

    output_norm: Literal["none", "head", "full"] = "full"
    chunk_size: Window = 256


class GLA(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="gla"):
    """Gated linear attention: S = diag(a) S + k v, with a decay a per key channel from a gate of low rank u.

    parameters in matmuls: m(2Hk + 2Hv) + Hvm + mu + uHk; the gate has Hk biases      state: Hkv elements
    state FLOPs per token: 5Hkv, one of them the decay. Chunked: 2Hkv late + 2Hkv + 2H(k + v) keys
    Parameters checked against flash-linear-attention.
    """

    source = "Yang et al. 2023, arXiv 2312.06635, section 4 (recurrent and chunkwise form); flash-linear-attention"
    letters = MatrixState.letters + " u=gate_rank"
    decay = "H*k*v"

    gate_rank: Size = 16

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("decay gate", "m*u + u*H*k"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("decay gate", "1", "u", "m"), ("decay gate", "1", "H*k", "u"))

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("biases", "H*k"))
