"""Delta rules, which correct the value that the state predicts for a key: DeltaNet, gated DeltaNet, KDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from powerplan.mixers.base import SAME, Size, Width, problem
from powerplan.mixers.formulas import Form, Formulas
from powerplan.mixers.linear import MatrixState


class DeltaRule(MatrixState, frozen=True, kw_only=True):
    """H heads with a state of k x v: S = S (I - b k k^T) + b v k^T, with short convolutions.

    Recurrent: 2Hkv each to read the value that the state predicts for the key, to correct it, and to query the state.
    Chunked (WY form): K K^T below the diagonal, its unit triangular inverse T, T K, T V, Q K^T and its product with the
    corrected values take 2H(k earlier + 2(k + v) keys) + H solve. The state is queried twice, 4Hkv late, and updated
    once, 2Hkv.
    """

    query: ClassVar[str] = "4*H*k*v"
    within: ClassVar[str] = "2*H*(k*earlier + 2*(k + v)*keys) + H*solve"

    conv_size: Width = 4

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("beta", "m*H"))

    def flops_formulas(self, form: Form) -> Formulas:
        if form == "chunked":
            return super().flops_formulas(form)
        step = self.update
        return self.steps(decay_state=self.decay, read_value=step, update_state=step, query_state=step)


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
    decay: ClassVar[str] = "H*k*v"
    decay_gate: ClassVar[str] = "m*H"
    letters: ClassVar[str] = DeltaRule.letters + " J=key_heads"
    whole_widths: ClassVar[tuple[str, ...]] = ("heads", "key_heads")
    same_as: ClassVar[Mapping[str, str]] = {"v_head_dim": "head_dim", "key_heads": "heads"}

    key_heads: Size = SAME

    def check(self) -> None:
        if self.heads % self.key_heads:
            raise problem("key_heads", f"key_heads {self.key_heads} does not divide heads {self.heads}")

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("decay gate", self.decay_gate))

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("decay", "2*H"))


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
    gate: ClassVar[str] = "m*u + u*H*v"
    decay_gate: ClassVar[str] = "m*u + u*H*k"
    letters: ClassVar[str] = GatedDeltaNet.letters + " u=gate_rank"
    same_as: ClassVar[Mapping[str, str]] = {**GatedDeltaNet.same_as, "gate_rank": "v_head_dim"}

    gate_rank: Size = SAME
    gate_bias: bool = False

    def other_formulas(self) -> Formulas:
        biases = "H*v" if self.gate_bias and self.output_gate else ""
        return (*DeltaRule.other_formulas(self), ("decay", "H + H*k"), ("biases", biases))
