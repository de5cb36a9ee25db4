"""Linear attention with a decay, one matrix of state per head: RetNet, lightning attention, gated linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar, Literal

from powerplan.mixers.base import SAME, Mixer, Size, StateSize, Width, Window
from powerplan.mixers.formulas import Convention, Rational, Term, mean_keys_in_chunks, mean_solve, term, total
from powerplan.mixers.heads import plain_heads_of
from powerplan.mixers.shape import Inherited


class ChunkedState(Mixer, frozen=True, kw_only=True):
    """A mixer with a recurrent state, computed token by token or in chunks of `chunk_size` tokens.

    Chunked, as in power attention: tokens of the first chunk do not query the state, and attention within chunks is
    added. A decay that depends on the data costs 1 FLOP per element of state in the recurrent form, where every token
    applies it. In the chunked form decays are elementwise work on the keys and queries, and not counted.
    """

    chunked_differs: ClassVar[bool] = True

    chunk_size: Window = 64

    def symbols(self, hidden: int = 0) -> dict[str, Rational]:
        """Return the letters of this layer; m is `hidden`."""
        raise NotImplementedError

    def chunk_symbols(self, context: int, convention: Convention) -> dict[str, Rational]:
        """Return the letters that only the chunked form has."""
        chunk, causal = self.chunk_size, convention.causal
        keys = mean_keys_in_chunks(context, causal, chunk)
        return {
            "keys": keys,
            "earlier": keys if causal == "full" else keys - 1,
            "late": Fraction(max(0, context - chunk), context),
            "solve": mean_solve(context, causal, chunk),
        }

    def state_size(self, context: int) -> StateSize:
        terms = self.state_terms(context)
        return StateSize(recurrent=int(terms[0].value), recent=int(total(terms[1:])))

    def recurrent_terms(self, **formulas: str) -> tuple[Term, ...]:
        """Return the terms of the recurrent form: `step_terms` with the letters of this layer."""
        return self.step_terms(self.symbols(), **formulas)

    def chunked_terms(
        self, context: int, convention: Convention, query: str, update: str, within: str
    ) -> tuple[Term, ...]:
        """Return the terms of the chunked form: to query the state, to update it, and attention within chunks."""
        symbols = self.symbols() | self.chunk_symbols(context, convention)
        return self.step_terms(symbols, query_state=f"{query}*late", update_state=update, within_chunks=within)


class MatrixState(ChunkedState, frozen=True, kw_only=True):
    """H heads with a state of k x v each, and the projections, convolutions and norms that such layers share.

    parameters in matmuls: m(2Hk + Hv) + Hvm, output gate mHv, short convolutions W(2Hk + Hv)
    output_norm: "head" has v weights, "full" Hv, "none" none.
    conv_size: width of the causal depthwise convolutions on queries, keys and values; 0 if there are none.
    conv_bias: whether these convolutions have biases.
    state_formula: the elements of the state. convolved: the channels of the convolutions.
    """

    state_formula: ClassVar[str] = "H*k*v"
    convolved: ClassVar[str] = "2*H*k + H*v"
    same_as: ClassVar[Mapping[str, str]] = {"v_head_dim": "head_dim"}

    heads: Size
    head_dim: Size
    v_head_dim: Size = SAME
    output_gate: bool = True
    output_norm: Literal["none", "head", "full"] = "head"
    conv_size: Width = 0
    conv_bias: bool = False

    def whole_widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def plain_heads(self, kind: str) -> Inherited:
        return plain_heads_of(self, kind)

    def symbols(self, hidden: int = 0) -> dict[str, Rational]:
        letters: dict[str, Rational] = {"H": self.heads, "k": self.head_dim, "v": self.v_head_dim, "W": self.conv_size}
        return letters | {"m": hidden}

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        symbols = self.symbols(hidden)
        terms = [term("projections", f"m*({self.convolved}) + H*v*m", symbols)]
        if self.output_gate:
            terms.append(self.output_gate_term(hidden))
        if self.conv_size:
            terms.append(term("short convolutions", f"W*({self.convolved})", symbols))
        return tuple(terms)

    def output_gate_term(self, hidden: int) -> Term:
        return term("output gate", "m*H*v", self.symbols(hidden))

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        symbols = self.symbols(hidden)
        terms = []
        if self.conv_size and self.conv_bias:
            terms.append(term("biases", self.convolved, symbols))
        if self.output_norm != "none":
            terms.append(term("output norm", "v" if self.output_norm == "head" else "H*v", symbols))
        return tuple(terms)

    def state_terms(self, context: int) -> tuple[Term, ...]:
        terms = [term(self.describe(), self.state_formula, self.symbols())]
        if self.conv_size:
            terms.append(term("short convolutions", f"(W - 1)*({self.convolved})", self.symbols()))
        return tuple(terms)

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        if convention.form == "chunked":
            return self.chunked_terms(context, convention, "2*H*k*v", "2*H*k*v", "2*H*(k + v)*keys")
        return self.recurrent_terms(query_state="2*H*k*v", update_state="2*H*k*v")

    def describe(self) -> str:
        return self.kind.replace("_", " ")


class RetNet(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="retnet"):
    """Multi-scale retention: S = gamma S + k v, with a gamma per head that is fixed.

    parameters in matmuls: m(2Hk + 2Hv) + Hvm, the output gate included      state: Hkv elements
    state FLOPs per token: 4Hkv; the fixed decay folds into queries and keys. Chunked: 2Hkv late + 2Hkv + 2H(k + v) keys
    output_norm: none in torchscale, whose group norm has no weights; "head" in flash-linear-attention.
    Parameters checked against both.
    """

    source: ClassVar[str] = "Sun et al. 2023, arXiv 2307.08621, equations 6 to 8; torchscale, multiscale_retention.py"

    output_norm: Literal["none", "head", "full"] = "none"


class Lightning(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="lightning"):
    """Lightning attention (MiniMax-01): linear attention with a fixed decay per head, sigmoid output gate, one norm.

    parameters in matmuls: m(2Hk + 2Hv) + Hvm, the output gate included      state: Hkv elements
    state FLOPs per token: 4Hkv. Chunked: 2Hkv late + 2Hkv + 2H(k + v) keys, chunks of 256
    Checked against transformers' MiniMax.
    """

    source: ClassVar[str] = "Qin et al. 2024, arXiv 2401.04658, algorithm 1; MiniMax-01, arXiv 2501.08313, section 2.2"

    output_norm: Literal["none", "head", "full"] = "full"
    chunk_size: Window = 256


class GLA(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="gla"):
    """Gated linear attention: S = diag(a) S + k v, with a decay a per key channel from a gate of low rank u.

    parameters in matmuls: m(2Hk + 2Hv) + Hvm + mu + uHk; the gate has Hk biases      state: Hkv elements
    state FLOPs per token: 5Hkv, one of them the decay. Chunked: 2Hkv late + 2Hkv + 2H(k + v) keys
    Parameters checked against flash-linear-attention.
    """

    source: ClassVar[str] = (
        "Yang et al. 2023, arXiv 2312.06635, section 4 (recurrent and chunkwise form); flash-linear-attention"
    )

    gate_rank: Size = 16

    def symbols(self, hidden: int = 0) -> dict[str, Rational]:
        return super().symbols(hidden) | {"u": self.gate_rank}

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().matmul_terms(hidden), term("decay gate", "m*u + u*H*k", self.symbols(hidden)))

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().other_terms(hidden), term("biases", "H*k", self.symbols(hidden)))

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        if convention.form == "chunked":
            return super().state_flops_terms(context, convention)
        return self.recurrent_terms(decay_state="H*k*v", query_state="2*H*k*v", update_state="2*H*k*v")
