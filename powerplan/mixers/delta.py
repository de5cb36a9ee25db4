"""Delta rules, which correct the value that the state predicts for a key: DeltaNet, gated DeltaNet, KDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from powerplan.mixers.base import SAME, Size, Width, problem
from powerplan.mixers.formulas import Convention, Rational, Term, term
from powerplan.mixers.linear import MatrixState


class DeltaRule(MatrixState, frozen=True, kw_only=True):
    """H heads with a state of k x v: S = S (I - b k k^T) + b v k^T, with short convolutions.

    Recurrent: 2Hkv each to read the value that the state predicts for the key, to correct it, and to query the state.
    Chunked (WY form): K K^T below the diagonal, its unit triangular inverse T, T K, T V, Q K^T and its product with the
    corrected values take 2H(k earlier + 2(k + v) keys) + H solve. The state is queried twice, 4Hkv late, and updated
    once, 2Hkv.
    """

    conv_size: Width = 4

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().matmul_terms(hidden), term("beta", "m*H", self.symbols(hidden)))

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        if convention.form == "chunked":
            within = "2*H*(k*earlier + 2*(k + v)*keys) + H*solve"
            return self.chunked_terms(context, convention, "4*H*k*v", "2*H*k*v", within)
        return self.recurrent_terms(read_value="2*H*k*v", update_state="2*H*k*v", query_state="2*H*k*v")


class DeltaNet(DeltaRule, frozen=True, kw_only=True, tag_field="kind", tag="deltanet"):
    """DeltaNet: the delta rule with a learning rate b per head, no decay.

    parameters in matmuls: m(2Hk + Hv + H) + Hvm + W(2Hk + Hv); output gate + mHv
    state: Hkv, and (W - 1)(2Hk + Hv) of the convolutions      state FLOPs per token: 6Hkv
    Chunked: 4Hkv late + 2Hkv + 2H(k earlier + 2(k + v) keys) + H solve. Parameters checked against
    flash-linear-attention.
    """

    source: ClassVar[str] = "Yang et al. 2024, arXiv 2406.06484, section 3 (chunkwise form); flash-linear-attention"

    output_gate: bool = False


class GatedDeltaNet(DeltaRule, frozen=True, kw_only=True, tag_field="kind", tag="gated_deltanet"):
    """Gated DeltaNet: S = a S (I - b k k^T) + b v k^T, with a decay a per head and token. J query and key heads.

    parameters in matmuls: m(2Jk + Hv + 2H) + Hvm + mHv + W(2Jk + Hv); A and dt biases are 2H more
    state: Hkv, and (W - 1)(2Jk + Hv) of the convolutions      state FLOPs per token: 7Hkv, one of them the decay
    Chunked: as DeltaNet. key_heads: in Qwen3-Next two value heads share one query and key head.
    Checked against transformers' Qwen3-Next and flash-linear-attention.
    """

    source: ClassVar[str] = "Yang et al. 2024, arXiv 2412.06464, section 3 (gated delta rule, chunkwise form)"
    convolved: ClassVar[str] = "2*J*k + H*v"

    same_as: ClassVar[Mapping[str, str]] = {"v_head_dim": "head_dim", "key_heads": "heads"}

    key_heads: Size = SAME

    def check(self) -> None:
        if self.heads % self.key_heads:
            raise problem("key_heads", f"key_heads {self.key_heads} does not divide heads {self.heads}")

    def whole_widths(self) -> dict[str, int]:
        return {"heads": self.heads, "key_heads": self.key_heads}

    def symbols(self, hidden: int = 0) -> dict[str, Rational]:
        return super().symbols(hidden) | {"J": self.key_heads}

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().matmul_terms(hidden), self.decay_term(hidden))

    def decay_term(self, hidden: int) -> Term:
        return term("decay gate", "m*H", self.symbols(hidden))

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().other_terms(hidden), term("decay", "2*H", self.symbols(hidden)))

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        terms = super().state_flops_terms(context, convention)
        return terms if convention.form == "chunked" else (*self.recurrent_terms(decay_state="H*k*v"), *terms)


class KDA(GatedDeltaNet, frozen=True, kw_only=True, tag_field="kind", tag="kda"):
    """Kimi delta attention: gated DeltaNet with a decay per key channel; decay and output gate of low rank u.

    parameters in matmuls: m(2Jk + Hv + H) + Hvm + (mu + uHk) + (mu + uHv) + W(2Jk + Hv); A and dt biases H + Hk more
    state: Hkv, and (W - 1)(2Jk + Hv) of the convolutions      state FLOPs per token: 7Hkv, one of them the decay
    Chunked: as DeltaNet. Equation 13 of the paper counts 6k^2 + 3ck + c^2 per head and token: three of the five
    products within a chunk, and c^2 for the inverse, which takes about c^2/3.
    gate_bias: biases of the output gate; flash-linear-attention has them, Kimi Linear does not.
    Checked against transformers' Kimi Linear and flash-linear-attention.
    """

    source: ClassVar[str] = "Kimi Linear, arXiv 2510.26692, section 3 (KDA), equation 13 (published FLOPs)"

    same_as: ClassVar[Mapping[str, str]] = {**GatedDeltaNet.same_as, "gate_rank": "v_head_dim"}

    gate_rank: Size = SAME
    gate_bias: bool = False

    def symbols(self, hidden: int = 0) -> dict[str, Rational]:
        return super().symbols(hidden) | {"u": self.gate_rank}

    def output_gate_term(self, hidden: int) -> Term:
        return term("output gate", "m*u + u*H*v", self.symbols(hidden))

    def decay_term(self, hidden: int) -> Term:
        return term("decay gate", "m*u + u*H*k", self.symbols(hidden))

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        symbols = self.symbols(hidden)
        terms = (*DeltaRule.other_terms(self, hidden), term("decay", "H + H*k", symbols))
        return (*terms, term("biases", "H*v", symbols)) if self.gate_bias and self.output_gate else terms
