"""Power attention of degree p, and linear attention: its case p = 1 without the normaliser."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import msgspec

from powerplan.choices import Kernels
from powerplan.dims import KERNEL_DEGREES, default_chunk_size, kernels_for, odd_degree, spow_dim, tiled_spow_dim
from powerplan.mixers.base import Mixer
from powerplan.mixers.formulas import Convention, Formulas, Rational
from powerplan.mixers.heads import GroupedHeads
from powerplan.mixers.kept import Kept, Moment, chunk_values, kept
from powerplan.mixers.linear import CHUNKS_PER_SAVED_STATE, RecurrentState
from powerplan.mixers.state_size import StateSize
from powerplan.part import Size, Window

MAX_DEGREE = 16
"""The highest degree that a spec may have; at d = 64 its state has 10^18 elements per head, too many for any use."""


class FeatureAttention(RecurrentState, GroupedHeads, frozen=True, kw_only=True):
    """Attention through a feature map phi of dimension D: state GD(v + z), with z = 1 if a normaliser is kept.

    parameters in matmuls: those of GQA, plus mG for the gate (one log-gate per key/value head, G biases if `bias`)
    state FLOPs per token: 2HD(v + z) to query the state and 2GD(v + z) to update it. Chunked: D is that of the tiled
    embedding, tokens of the first chunk do not query the state, and 2H(k + v) keys within chunks are added.

    gated: one gate per key/value head and token, by which the state decays.
    chunk_size: tokens of a chunk in the chunked form; the kernels' default for the head dim and degree where left out.
    """

    letters = "m H=heads G=kv_heads D=feature_dim k=head_dim v=v_head_dim z=has_normaliser"
    state = "G*D*(v + z)"
    query = "2*H*D*(v + z)"
    update = "2*G*D*(v + z)"
    state_again = update

    gated: bool = False
    chunk_size: Window | None = None

    @property
    def transition(self) -> str:  # type: ignore[override]
        return "G" if self.gated else ""

    @property
    def degree(self) -> int:
        """The degree of phi; 1 is the identity."""
        return 1

    @property
    def has_normaliser(self) -> bool:
        """Whether the state has a column for the sum of weights."""
        return False

    @property
    def executed_dim(self) -> int:
        """The dimension of phi in a chunked kernel."""
        return self.head_dim

    @property
    def feature_dim(self) -> int:
        """The dimension of phi."""
        return spow_dim(self.head_dim, self.degree)

    @property
    def gpu_kernel_problem(self) -> str | None:
        kernels = kernels_for(self.degree, self.head_dim, self.v_head_dim)
        if self.kernel_problem is not None or "triton" in kernels:
            return None
        return f"no GPU kernel for {self.describe()} in heads of {self.own_heads().dims} (powerplan dims)"

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("gate", "m*G" if self.gated else ""))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("gate", "1" if self.gated else "0", "G", "m"))

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("biases", "G" if self.gated and self.input_bias else ""))

    def effective_chunk_size(self) -> int:
        """Return the chunk of the spec, or the kernels' default for this head dim and degree."""
        return self.chunk_size or default_chunk_size(self.head_dim, self.degree)

    def features_size(self) -> StateSize:
        features = self.kv_heads * self.feature_dim * self.v_head_dim
        return StateSize(recurrent=features, entry=self.kv_heads * (self.head_dim + self.v_head_dim))

    def mix_kept(self, context: int, kernels: Kernels) -> tuple[Kept, ...]:
        """Return queries, keys, values, outputs, gates, sums of weights, and states: every eighth chunk's in torch.

        The Triton kernels keep the state before every chunk, in bf16 where activations have 16 bits (in fp16 they keep
        fp32, which is not counted), and for p = 2 its normaliser as a k x k matrix (kernels/triton/shapes.py,
        saved_states). torch's logsigmoid keeps its input and one number more on a CPU.
        """
        if kernels == "fused":
            return (*self._heads_kept("2*G"), *self._fused_states())
        columns = "(v + 1)" if self.has_normaliser else "v"
        return (*self._heads_kept("3*G"), *kept(("states", "fp32", f"G*D*{columns}*states")))

    def _heads_kept(self, gates: str) -> tuple[Kept, ...]:
        return kept(
            ("queries, keys, values", "activations", "H*k + G*(k + v)"),
            ("outputs", "activations", "H*v"),
            ("gates", "fp32", gates if self.gated else "", True),
            ("sums of weights", "fp32", "H" if self.has_normaliser else ""),
        )

    def _fused_states(self) -> tuple[Kept, ...]:
        states = kept(("states", "activations", "G*D*v*states"))
        if not self.has_normaliser:
            return states
        squares = kept(("states", "activations", "G*k*k*states"))
        return (*states, *(squares if self.degree == 2 else kept(("states", "fp32", "G*D*states"))))

    def mix_moments(self, context: int, kernels: Kernels) -> tuple[Moment, ...]:
        """Return gradients of the inputs, from that of the output.

        The Triton kernels add the gradient over the sums of weights, queries with time last, and the states' gradients
        before and after they are added up (kernels/triton/hopper/run.py).
        """
        gradients = kept(
            ("gradients", "activations", "H*k + G*(k + v) + H*v"), ("gradients", "fp32", "G" if self.gated else "")
        )
        if kernels == "torch":
            return (gradients,)
        return ((*gradients, *kept(("workspace", "activations", "H*k + 2*H*v + 2*G*D*v*states"))),)

    def saved_values(self, context: int, kernels: Kernels) -> dict[str, Rational]:
        if kernels == "torch":
            chunk, per_state = self.effective_chunk_size(), CHUNKS_PER_SAVED_STATE
            return chunk_values(context, chunk, per_state) | {"D": self.executed_dim}
        values = chunk_values(context, self.chunk_size or default_chunk_size(self.head_dim, self.degree, "triton"))
        # Where there are several chunks, the empty state before the first one is kept too.
        return values | {"D": self.executed_dim, "states": values["states"] and values["states"] + Fraction(1, context)}

    @classmethod
    def relatives(cls) -> type[Mixer]:
        """Power and linear attention have gates and chunks in common."""
        return FeatureAttention

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        values = super().flops_values(context, convention)
        return values | {"D": self.executed_dim} if convention.form == "chunked" else values


class Power(FeatureAttention, frozen=True, kw_only=True, tag_field="kind", tag="power"):
    """Power attention: weights (q.k)^p and D = C(k+p-1, p). The degree sets the size of the state, without parameters.

    p: the degree; odd ones need `normalize: false` in kernels, as their weights have both signs.
    normalize: divide by the sum of weights, which takes one more column of state.
    tile: features in a tile of the tiled embedding, which the chunked form executes.
    """

    source = "Gelada et al. 2025, arXiv 2507.04239, Table 3 (dimensions) and Appendix F (chunked stages)"
    saved_source = "kernels/triton/shapes.py, saved_states; kernels/eager.py, ChunkedPower"
    tracked = True

    p: Annotated[int, msgspec.Meta(ge=1, le=MAX_DEGREE)]
    normalize: bool = True
    tile: Size = 8

    @property
    def degree(self) -> int:
        return self.p

    @property
    def kernel_problem(self) -> str | None:
        if self.p not in KERNEL_DEGREES:
            return f"p > {max(KERNEL_DEGREES)} has no kernel here"
        if odd_degree(self.p) and self.normalize:
            return "odd degree: kernels need normalize: false (weights of both signs)"
        if not kernels_for(self.p, self.head_dim, self.v_head_dim):
            return f"p={self.p} has no kernel here in heads of {self.head_dim}"
        return None

    @property
    def has_normaliser(self) -> bool:
        return self.normalize

    @property
    def executed_dim(self) -> int:
        return self.head_dim if self.p == 1 else tiled_spow_dim(self.head_dim, self.p, min(self.tile, self.head_dim))

    def describe(self) -> str:
        return f"power p={self.p}"


class Linear(FeatureAttention, frozen=True, kw_only=True, tag_field="kind", tag="linear"):
    """Linear attention with the identity feature map: power attention with p = 1 and no normaliser, state G k v."""

    source = "Katharopoulos et al. 2020, arXiv 2006.16236, section 3.4 (recurrent form)"
    saved_source = Power.saved_source
    tracked = True
