"""Delta rules, which correct the value that the state predicts for a key: DeltaNet, gated DeltaNet, KDA, RWKV-7."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import ClassVar, Literal

from powerplan.choices import Kernels
from powerplan.mixers.base import Inherited, Mixer
from powerplan.mixers.formulas import Formulas, Rational
from powerplan.mixers.kept import Kept, Moment, kept
from powerplan.mixers.linear import ChunkedState, MatrixState, piece_values, recurrence_outputs
from powerplan.part import SAME, Size, Width, problem


class DeltaRule(MatrixState, frozen=True, kw_only=True):
    """H heads with a state of k x v: S = S (I - b k k^T) + b v k^T, with short convolutions.

    Recurrent: 2Hkv each to read the value that the state predicts for the key, to correct it, and to query the state.
    Chunked (WY form): K K^T below the diagonal, its unit triangular inverse T, T K, T V, Q K^T and its product with the
    corrected values take 2H(k earlier + 2(k + v) keys) + H solve. The state is queried twice, 4Hkv late, and updated
    once, 2Hkv.
    """

    query = "4*H*k*v"
    within = "2*H*(k*earlier + 2*(k + v)*keys) + H*solve"
    transition = "H*k*k"
    state_again = "4*H*k*(k + v)"  # The transition is k more columns of the state.
    key_letter = "H"
    fused_gates: ClassVar[tuple[str, str]] = ("", "")
    fused_scores = "H*chunk"
    torch_gates: ClassVar[tuple[str, str]] = ("", "(4 + cast)*H")
    torch_keys = "H*k*(8 + late)"
    torch_scores = "5*H*chunk"
    activated = True

    conv_size: Width = 4

    def mix_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return normalised queries and keys, values, gates, and the inverse of each chunk's triangular matrix.

        In torch, all tensors of models/mixers/recurrence.py: keys and queries in several decayed forms, the values
        before and after they are corrected, the steps from scores to the inverse, and two states per chunk.
        fused_gates, torch_gates: formulas in the format of activations, beside the learning rate, and in fp32.
        fused_scores: in the format of activations. torch_keys, torch_scores: in fp32.
        """
        queries = f"2*{self.key_letter}*k"
        if kernels == "fused":
            return kept(
                ("queries, keys, values", "activations", f"{queries} + H*v"),
                ("norms of queries and keys", "fp32", f"2*{self.key_letter}", True),
                ("gates", "activations", "H" + self.fused_gates[0]),
                ("gates", "fp32", self.fused_gates[1], True),
                ("scores", "activations", self.fused_scores),
            )
        activations, fp32 = self.torch_gates
        return kept(
            ("norms of queries and keys", "activations", f"{queries} + 4*{self.key_letter}", True),
            ("gates", "activations", "H" + activations),
            ("gates", "fp32", fp32, True),
            ("decayed keys and queries", "fp32", self.torch_keys),
            ("values", "fp32", "H*v*(4 + late)"),
            ("scores", "fp32", self.torch_scores),
            ("states", "fp32", "2*H*k*v*states"),
        )

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return those of the norm and the gate; in torch, that of the recurrence's outputs too."""
        moments = super().own_moments(context, kernels)
        if kernels == "fused":
            return moments
        outputs = recurrence_outputs("0", f"2*{self.key_letter}*k + H*k + H*v")
        return (*moments, (*outputs, *self._output_not_kept()))

    def mix_backward(self) -> Moment:
        """Return what the fused kernel's backward pass makes: gradients, what it computes again, and the states.

        Computed again are w, u, the states before all chunks and the corrected values (ops/delta_rule/chunk.py).
        """
        return kept(("gradients", "activations", "4*H*k + 5*H*v"), ("states", "activations", "2*H*k*v*states"))

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("beta", "m*H"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("beta", "1", "H", "m"))

    def flops_formulas(self, chunked: bool) -> Formulas:
        if chunked:
            return super().flops_formulas(chunked)
        step = self.update
        return self.steps(decay_state=self.decay, read_value=step, update_state=step, query_state=step)


class DeltaNet(DeltaRule, frozen=True, kw_only=True, tag_field="kind", tag="deltanet"):
    """DeltaNet: the delta rule with a learning rate b per head, no decay.

    parameters in matmuls: m(2Hk + Hv + H) + Hvm + W(2Hk + Hv); output gate + mHv
    state: Hkv, and (W - 1)(2Hk + Hv) of the convolutions      state FLOPs per token: 6Hkv
    Chunked: 4Hkv late + 2Hkv + 2H(k earlier + 2(k + v) keys) + H solve. Parameters checked against
    flash-linear-attention.
    """

    source = "Yang et al. 2024, arXiv 2406.06484, section 3 (chunkwise form); flash-linear-attention"
    saved_source = "flash-linear-attention, ops/delta_rule/chunk.py, ChunkDeltaRuleFunction.forward"
    tracked = True

    output_gate: bool = False


class GatedDeltaNet(DeltaRule, frozen=True, kw_only=True, tag_field="kind", tag="gated_deltanet"):
    """Gated DeltaNet: S = a S (I - b k k^T) + b v k^T, with a decay a per head and token. J query and key heads.

    parameters in matmuls: m(2Jk + Hv + 2H) + Hvm + mHv + W(2Jk + Hv); A and dt biases are 2H more
    state: Hkv, and (W - 1)(2Jk + Hv) of the convolutions      state FLOPs per token: 7Hkv, one of them the decay
    Chunked: as DeltaNet.
    Checked against transformers' Qwen3-Next and flash-linear-attention.

    key_heads: query and key heads; in Qwen3-Next two value heads share one.
    """

    source = "Yang et al. 2024, arXiv 2412.06464, section 3 (gated delta rule, chunkwise form)"
    saved_source = "flash-linear-attention, ops/gated_delta_rule/chunk.py, ChunkGatedDeltaRuleFunction.forward"
    tracked = True
    key_letter = "J"
    fused_gates: ClassVar[tuple[str, str]] = (" + 2*H", "H")
    torch_gates: ClassVar[tuple[str, str]] = ("", "(7 + cast)*H")
    torch_keys = "H*k*(9 + late)"
    torch_scores = "7*H*chunk"
    convolved = "2*J*k + H*v"
    decay = "H*k*v"
    decay_gate = "m*H"
    decay_shapes: ClassVar[tuple[tuple[str, str], ...]] = (("H", "m"),)
    letters = DeltaRule.letters + " J=key_heads"
    whole_widths: ClassVar[tuple[str, ...]] = ("heads", "key_heads")
    same_as: ClassVar[Mapping[str, str]] = {"v_head_dim": "head_dim", "key_heads": "heads"}

    key_heads: Size = SAME

    def check(self) -> None:
        if self.heads % self.key_heads:
            raise problem("key_heads", f"key_heads {self.key_heads} does not divide heads {self.heads}")

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("decay gate", self.decay_gate))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        decay = (("decay gate", "1", rows, columns) for rows, columns in self.decay_shapes)
        return (*super().matrix_formulas(idle), *decay)

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("decay", "2*H"))


class KDA(GatedDeltaNet, frozen=True, kw_only=True, tag_field="kind", tag="kda"):
    """Kimi delta attention: gated DeltaNet with a decay per key channel; decay and output gate of low rank u.

    parameters in matmuls: m(2Jk + Hv + H) + Hvm + (mu + uHk) + (mu + uHv) + W(2Jk + Hv); A and dt biases H + Hk more
    state: Hkv, and (W - 1)(2Jk + Hv) of the convolutions      state FLOPs per token: 7Hkv, one of them the decay
    Chunked: as DeltaNet. Equation 13 of the paper counts 6k^2 + 3ck + c^2 per head and token: three of the five
    products within a chunk, and c^2 for the inverse, which takes about c^2/3.
    Checked against transformers' Kimi Linear and Bailing hybrid, and flash-linear-attention.

    gate_rank: rank of the two projections that make the decay, and of those that make the output gate.
    gate_bias: biases of the output gate; flash-linear-attention has them, Kimi Linear does not.
    full_rank: "gate" for one projection mHv in place of the output gate's two (Kimi K3), "both" for the decay's as well
    (mHk, Ling 2.5).
    """

    source = "Kimi Linear, arXiv 2510.26692, section 3 (KDA), equation 13 (published FLOPs)"
    saved_source = "flash-linear-attention, ops/kda/chunk.py, ChunkKDAFunction.forward"
    tracked = True
    fused_gates: ClassVar[tuple[str, str]] = (" + H + H*k + u", "")
    fused_scores = "2*H*chunk"
    torch_gates: ClassVar[tuple[str, str]] = (" + u", "cast*H + 3*H*k")
    torch_keys = "H*k*(12 + late + 3*pieces)"
    torch_scores = "4*H*chunk"
    sigmoid_gate = True
    letters = GatedDeltaNet.letters + " u=gate_rank"
    same_as: ClassVar[Mapping[str, str]] = {**GatedDeltaNet.same_as, "gate_rank": "v_head_dim"}

    gate_rank: Size = SAME
    gate_bias: bool = False
    full_rank: Literal["none", "gate", "both"] = "none"

    @property
    def gate(self) -> str:  # type: ignore[override]
        return "m*u + u*H*v" if self.full_rank == "none" else "m*H*v"

    @property
    def decay_gate(self) -> str:  # type: ignore[override]
        return "m*H*k" if self.full_rank == "both" else "m*u + u*H*k"

    @property
    def gate_shapes(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return (("u", "m"), ("H*v", "u")) if self.full_rank == "none" else (("H*v", "m"),)

    @property
    def decay_shapes(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return (("H*k", "m"),) if self.full_rank == "both" else (("u", "m"), ("H*k", "u"))

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        low_rank = "u" if self.output_gate and self.full_rank == "none" else ""
        return (*super().own_kept(context, kernels), *kept(("output gate", "activations", low_rank)))

    def saved_values(self, context: int, kernels: Kernels) -> dict[str, Rational]:
        return piece_values(super().saved_values(context, kernels))

    def other_formulas(self) -> Formulas:
        biases = "H*v" if self.gate_bias and self.output_gate else ""
        return (*DeltaRule.other_formulas(self), ("decay", "H + H*k"), ("biases", biases))


class RWKV7(ChunkedState, frozen=True, kw_only=True, tag_field="kind", tag="rwkv7"):
    """RWKV-7's time mix: S = S (diag(w) + a b^T) + v k^T, with decay w, a and b from the data.

    parameters in matmuls: 2mHk + 2mHv, (m + Hk) for each rank of decay and learning rate, (m + Hv) for each rank of
    value residual and output gate; outside: token shifts, key weights, biases of the ranks, the output norm
    state: Hkv, and the last inputs of the time mix and of the channel mix, Hk each (Hk is the hidden size in RWKV)
    state FLOPs per token: 9Hkv: 1 for the decay, and 2 each for S a, (S a) b^T, v k^T and the query
    Chunked (WY form): 4Hkv late + 4Hkv + 2H((2k + v) earlier + 3(k + v) keys) + H solve
    Parameters checked against flash-linear-attention and the 450.77M of RWKV-7 World 0.4B.

    heads: heads, each with a state of its own.
    head_dim: features of a query and of a key, per head.
    v_head_dim: features of a value, per head.
    decay_rank: rank of the two projections that make the decay.
    rate_rank: rank of the two projections that make the learning rate.
    gate_rank: rank of the two projections that make the output gate.
    value_rank: rank of those that mix in the first layer's values; left out in the first layer, which has no value
    residual.
    channel_mix: the FFN of the layer is RWKV's, whose token shift is counted here: m weights, and Hk of state.
    """

    source = "Peng et al. 2025, arXiv 2503.14456, section 4; flash-linear-attention, dplr/naive.py (chunks)"
    letters = "H=heads k=head_dim v=v_head_dim m rw=decay_rank ra=rate_rank rv=value_rank rg=gate_rank"
    decay = "H*k*v"
    update = "4*H*k*v"
    within = "2*H*((2*k + v)*earlier + 3*(k + v)*keys) + H*solve"
    transition = "H*k*k"
    state_again = "4*H*k*(k + v)"  # As of delta rules.
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

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        ranks = {
            "decay and learning rate": (("rw", "H*k"), ("ra", "H*k")),
            "output gate": (("rg", "H*v"),),
            "value residual": (("rv", "H*v"),) if self.value_rank else (),
        }
        low = [(name, *pair) for name, pairs in ranks.items() for pair in pairs]
        return (
            ("projections", "2", "H*k", "m"),
            ("projections", "1", "H*v", "m"),
            ("projections", "1", "m", "H*v"),
            *((name, "1", rank, "m") for name, rank, _ in low),
            *((name, "1", wide, rank) for name, rank, wide in low),
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

    def flops_formulas(self, chunked: bool) -> Formulas:
        if not chunked:
            read = self.query
            return self.steps(decay_state=self.decay, read_state=read, update_state=self.update, query_state=read)
        late = f"{self.query}*late"
        return self.steps(read_state=late, update_state=self.update, query_state=late, within_chunks=self.within)
