"""Linear attention with a decay, one matrix of state per head: RetNet, lightning attention, gated linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar, Literal

from powerplan.choices import Kernels
from powerplan.mixers.base import Mixer
from powerplan.mixers.formulas import Convention, Formulas, Rational, mean_keys_in_chunks, mean_solve
from powerplan.mixers.kept import Kept, Moment, chunk_values, kept, norm_kept
from powerplan.part import SAME, Size, Width, Window

CHUNKS_PER_SAVED_STATE = 8
"""The torch engine of power attention keeps the state before every eighth chunk (kernels/chunked.py)."""

TOKENS_PER_PIECE = 8
"""Tokens of a chunk that share an anchor where each key channel has its own decay (models/mixers/recurrence.py)."""


def piece_values(values: dict[str, Rational]) -> dict[str, Rational]:
    """Return the letters of chunks, and how many pieces a chunk has."""
    return values | {"pieces": -(-int(values["chunk"]) // TOKENS_PER_PIECE)}


def recurrence_outputs(copies: str, projections: str) -> Moment:
    """Return what exists in models/mixers/recurrence.py when the outputs of all chunks are joined.

    Beside what stays: outputs within chunks and from states, their sum and the whole, decayed queries and sums of
    decays, what heads were cast from, and copies of the decayed keys.
    """
    return kept(
        ("outputs", "fp32", f"({copies} + 2)*H*k + 2*H*v*(1 + late)"),
        ("projections", "activations", f"cast*({projections})"),
    )


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
    """A recurrent state whose chunks have a size that follows from nothing else.

    chunk_size: tokens of a chunk in the chunked form.
    """

    chunk_size: Window = 64

    def effective_chunk_size(self) -> int:
        return self.chunk_size

    @property
    def chunk_state(self) -> str:
        return self.state_formulas()[0][1]

    def saved_values(self, context: int, kernels: Kernels) -> dict[str, Rational]:
        return chunk_values(context, self.chunk_size)


class MatrixState(ChunkedState, frozen=True, kw_only=True):
    """H heads with a state of k x v each, and the projections, convolutions and norms that such layers share.

    parameters in matmuls: m(2Hk + Hv) + Hvm, output gate mHv, short convolutions W(2Hk + Hv)
    state: the elements of the state. convolved: the channels of the convolutions. gate: parameters of the output gate.
    activated: whether queries, keys and values go through SiLU without convolutions too. sigmoid_gate: whether the
    output gate is a sigmoid, and not SiLU.

    heads: heads, each with a state of its own.
    head_dim: features of a query and of a key, per head.
    v_head_dim: features of a value, per head.
    output_gate: a projection of the hidden state that multiplies the output.
    output_norm: a norm of the output: "head" has v weights, "full" Hv, "none" none.
    conv_size: tokens that the causal depthwise convolutions on queries, keys and values span; 0 if there are none.
    conv_bias: whether these convolutions have biases.
    """

    letters = "H=heads k=head_dim v=v_head_dim W=conv_size m"
    state = "H*k*v"
    convolved = "2*H*k + H*v"
    gate = "m*H*v"
    gate_shapes: ClassVar[tuple[tuple[str, str], ...]] = (("H*v", "m"),)
    activated: ClassVar[bool] = False
    sigmoid_gate: ClassVar[bool] = False
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

    def own_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return the input, convolutions and SiLU, what `mix_kept` says, and the output's norm and gate.

        A fused convolution keeps its input and applies SiLU itself; flash-linear-attention, modules/conv/triton/ops.py.
        A fused norm with a gate keeps both inputs; modules/fused_norm_gate.py. torch keeps a copy more for each of
        SiLU's input and output.
        """
        fused = kernels == "fused"
        silu = self.conv_size > 0 or self.activated
        eager = silu and not (fused and self.conv_size)
        return (
            *kept(("input", "activations", "m")),
            *kept(("convolution", "activations", self.convolved if self.conv_size else "")),
            *kept(("SiLU", "activations", self.convolved if eager else "", True)),
            *self.mix_kept(context, kernels),
            *self._output_kept(kernels),
        )

    def _output_kept(self, kernels: Kernels) -> tuple[Kept, ...]:
        rows = "1" if self.output_norm == "full" else "H"
        if kernels == "fused":
            gate = "H*v" if self.output_gate else ""
            return (
                *kept(("outputs", "activations", "H*v"), ("output norm", "fp32", rows, True)),
                *kept(("output gate", "activations", gate), ("gated output", "activations", "H*v", True)),
            )
        norm = norm_kept(kernels, "H*v", rows, self.output_norm != "none", self.keeps_output)
        gates = f"{self._gate_tensors}*H*v" if self.output_gate else ""
        return (*norm, *kept(("output gate", "activations", gates), ("gated output", "activations", "H*v", True)))

    @property
    def _gate_tensors(self) -> int:
        """How many tensors of H v an output gate keeps in torch: the norm's output, and one or two of its own."""
        return 2 if self.sigmoid_gate else 3

    @property
    def keeps_output(self) -> bool:
        """Whether torch's kernel keeps its output, which the norm reads."""
        return False

    def mix_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return what the kernel keeps, without its output."""
        raise NotImplementedError

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return the moments of the output gate and of the norm; fused, that of the kernel.

        torch's norm makes five fp32 tensors of its input's size at once. By then the gate's tensors are gone.
        """
        if kernels == "fused":
            return (self.mix_backward(),)
        made = "4*H*v" if self.output_norm != "none" else "5*H*v"
        gone = f"m - {self._gate_tensors + 1}*H*v" if self.output_gate else "-H*v"
        norm = kept(("norm", "fp32", made), ("gate", "activations", gone))
        return (norm, kept(("gate", "activations", "2*H*v"))) if self.output_gate else (norm,)

    def _output_not_kept(self) -> Moment:
        """Return what output norm and gate keep, as less: for moments before them, and for those when it is gone."""
        return tuple(part._replace(formula=f"-({part.formula})") for part in self._output_kept("torch"))

    def mix_backward(self) -> Moment:
        """Return what the fused kernel's backward pass makes: gradients, and the states of all chunks and theirs.

        flash-linear-attention computes the states again there (ops/common/chunk_h.py).
        """
        return kept(("gradients", "activations", "2*H*k + 2*H*v"), ("states", "activations", "2*H*k*v*states"))


class FixedDecay(MatrixState, frozen=True, kw_only=True):
    """Linear attention with a decay per head that is fixed.

    rotated: whether queries and keys are rotated by their positions.
    """

    transition = "H"  # power_attention takes the decays as gates, and passes on gates.
    state_again = MatrixState.update
    rotated: ClassVar[bool] = False

    def mix_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return queries, keys and values; in torch the output, and the state before every eighth chunk."""
        heads = kept(("queries, keys, values", "activations", self.convolved))
        if kernels == "fused":
            return heads
        return (
            *kept(("rotation", "activations", "(1 + cast)*k" if self.rotated else "", True)),
            *heads,
            *kept(("outputs", "activations", "H*v"), ("states", "fp32", "H*k*v*states")),
        )

    @property
    def keeps_output(self) -> bool:
        return True

    def saved_values(self, context: int, kernels: Kernels) -> dict[str, Rational]:
        return chunk_values(context, self.chunk_size, CHUNKS_PER_SAVED_STATE if kernels == "torch" else 1)


class RetNet(FixedDecay, frozen=True, kw_only=True, tag_field="kind", tag="retnet"):
    """Multi-scale retention: S = gamma S + k v, with a gamma per head that is fixed.

    parameters in matmuls: m(2Hk + 2Hv) + Hvm, the output gate included      state: Hkv elements
    state FLOPs per token: 4Hkv; the fixed decay folds into queries and keys. Chunked: 2Hkv late + 2Hkv + 2H(k + v) keys
    Parameters checked against both.

    output_norm: "none" in torchscale, whose group norm has no weights; "head" in flash-linear-attention, "full" for one
    norm over all heads.
    """

    source = "Sun et al. 2023, arXiv 2307.08621, equations 6 to 8; torchscale, multiscale_retention.py"
    saved_source = "flash-linear-attention, ops/simple_gla/chunk.py, ChunkSimpleGLAFunction.forward"
    tracked = True
    rotated = True

    output_norm: Literal["none", "head", "full"] = "none"


class Lightning(FixedDecay, frozen=True, kw_only=True, tag_field="kind", tag="lightning"):
    """Lightning attention (MiniMax-01): linear attention with a fixed decay per head, sigmoid output gate, one norm.

    parameters in matmuls: m(2Hk + 2Hv) + Hvm, the output gate included      state: Hkv elements
    state FLOPs per token: 4Hkv. Chunked: 2Hkv late + 2Hkv + 2H(k + v) keys, chunks of 256
    Checked against transformers' MiniMax.
    """

    source = "Qin et al. 2024, arXiv 2401.04658, algorithm 1; MiniMax-01, arXiv 2501.08313, section 2.2"
    saved_source = RetNet.saved_source
    tracked = True
    activated = True
    sigmoid_gate = True

    output_norm: Literal["none", "head", "full"] = "full"
    chunk_size: Window = 256


class GLA(MatrixState, frozen=True, kw_only=True, tag_field="kind", tag="gla"):
    """Gated linear attention: S = diag(a) S + k v, with a decay a per key channel from a gate of low rank u.

    parameters in matmuls: m(2Hk + 2Hv) + Hvm + mu + uHk; the gate has Hk biases      state: Hkv elements
    state FLOPs per token: 5Hkv, one of them the decay. Chunked: 2Hkv late + 2Hkv + 2H(k + v) keys
    Parameters checked against flash-linear-attention.

    gate_rank: rank of the two projections that make the decay.
    """

    source = "Yang et al. 2023, arXiv 2312.06635, section 4 (recurrent and chunkwise form); flash-linear-attention"
    saved_source = "flash-linear-attention, ops/gla/chunk.py, ChunkGLAFunction.forward"
    tracked = True
    letters = MatrixState.letters + " u=gate_rank"
    decay = "H*k*v"
    transition = "H*k"
    state_again = MatrixState.update

    gate_rank: Size = 16

    def mix_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return queries, keys, values, gates and the fp32 scores of each chunk; in torch all of recurrence.py.

        torch: decays are relative to an anchor in each piece of 8 tokens, and three tensors hold all keys of a chunk
        for each piece. Two tensors hold a state per chunk.
        """
        if kernels == "fused":
            return kept(
                ("queries, keys, values", "activations", "2*H*k + H*v"),
                ("gates", "activations", "u + 2*H*k"),
                ("scores", "fp32", "H*chunk"),
            )
        return kept(
            ("gates", "activations", "u"),
            ("gates", "fp32", "3*H*k", True),
            ("decayed keys and queries", "fp32", "H*k*(7 + late + 3*pieces)"),
            ("values", "fp32", "2*H*v"),
            ("scores", "fp32", "H*chunk"),
            ("states", "fp32", "2*H*k*v*states"),
        )

    def own_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return those of the norm and the gate; in torch, three of the recurrence too.

        In the forward pass there are three tensors of scores before the one that is kept. In the backward pass the
        gradient of the decayed keys and those of its two factors exist at once. By then the keys are gone, and all that
        comes after them: scores, states, new values, output norm and gate.
        """
        moments = super().own_moments(context, kernels)
        if kernels == "fused":
            return moments
        copy, after = "0" if self.conv_size else "pieces", "H*k*late + H*v + 2*H*k*v*states"
        scores = kept(
            ("decayed keys and scores", "fp32", f"({copy} + 2)*H*k + 2*H*chunk - ({after})"),
            ("projections", "activations", "cast*(3*H*k + H*v)"),
        )
        keys = kept(
            ("decayed keys", "fp32", f"2*pieces*H*k - ({after} + H*chunk + H*v)"),
            ("gradients", "activations", "m" if self.output_gate else ""),
        )
        outputs = recurrence_outputs(copy, "3*H*k + H*v")
        return (*moments, *((*moment, *self._output_not_kept()) for moment in (scores, keys, outputs)))

    def saved_values(self, context: int, kernels: Kernels) -> dict[str, Rational]:
        return piece_values(super().saved_values(context, kernels))

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("decay gate", "m*u + u*H*k"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("decay gate", "1", "u", "m"), ("decay gate", "1", "H*k", "u"))

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("biases", "H*k"))
