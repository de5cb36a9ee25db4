"""WERSA: linear attention with random features of queries and keys that are filtered by Haar wavelets."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from powerplan.choices import Kernels
from powerplan.mixers.formulas import Formulas, Rational
from powerplan.mixers.heads import GroupedHeads
from powerplan.mixers.kept import chunk_values
from powerplan.mixers.linear import RecurrentState
from powerplan.part import Size, Width, Window


class Wersa(RecurrentState, GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="wersa"):
    """Wavelet-enhanced random spectral attention: linear attention with D random features and a normaliser.

    Queries and keys go through a Haar transform of `wavelet_levels` levels, whose scales a small network weights per
    token, and through its inverse; then D = random_features random projections and ReLU. The network reads a depthwise
    convolution of the hidden state over W tokens.
    parameters in matmuls: attention's, Wm of the convolution, m(m/4) + (m/4) scales of the network (m/4 rounded down)
    state: GD(v + 1); and last inputs: (W - 1)Hk of the convolution, which is counted as wide as the queries, and
    (H + G)k(wave - 1) queries and keys of a block of the transform, 2^wavelet_levels tokens, that is not full
    state FLOPs per token: 2(H + G)kD for the random features, whose matrix is fixed and no parameter; 2GD(v + 1) to
    update, 2HD(v + 1) to query. The transforms add, and are not counted. Chunked: 2HD(v + 1) late + 2GD(v + 1)
    + 2H(D + v + 1) keys, and the features.
    As published, convolution and transform read later tokens too; what is counted is the same work.
    Not checked against the authors' code, which is not public: the layer follows a public re-implementation.

    random_features: random features of a query or a key, per head.
    wavelet_levels: levels of the Haar transform.
    conv_size: tokens that the convolution before the network spans.
    chunk_size: tokens of a chunk in the chunked form.
    """

    source = "Dentamaro 2025, arXiv 2507.08637; parameters from a public re-implementation"
    letters = (
        "m H=heads G=kv_heads k=head_dim v=v_head_dim D=random_features W=conv_size scales=scales wave=wave_tokens"
    )
    query = "2*H*D*(v + 1)"
    update = "2*G*D*(v + 1)"
    within = "2*H*(D + v + 1)*keys"
    not_shared: ClassVar[frozenset[str]] = GroupedHeads.not_shared | {"chunk_size"}

    random_features: Size = 1024
    wavelet_levels: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    conv_size: Width = 33
    chunk_size: Window = 64

    @property
    def chunk_state(self) -> str:
        return self.state_formulas()[0][1]

    def effective_chunk_size(self) -> int:
        return self.chunk_size

    def saved_values(self, context: int, kernels: Kernels) -> dict[str, Rational]:
        return chunk_values(context, self.chunk_size)

    @property
    def scales(self) -> int:
        """The details of every level, and what is left."""
        return self.wavelet_levels + 1

    @property
    def wave_tokens(self) -> int:
        """Tokens of a block that the transform mixes."""
        return 1 << self.wavelet_levels

    def matmul_formulas(self) -> Formulas:
        return (
            *super().matmul_formulas(),
            ("scale filters", "m*(m//4) + (m//4)*scales"),
            ("short convolutions", "W*m"),
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        filters = ("scale filters", "1", "m//4", "m"), ("scale filters", "1", "scales", "m//4")
        return (*super().matrix_formulas(idle), *filters)

    def other_formulas(self) -> Formulas:
        return (
            *super().other_formulas(),
            ("biases", "m//4 + scales"),
            ("biases", "m" if self.conv_size else ""),
            ("bandwidth and scales", "1 + scales"),
            ("output norm", "2*v"),
        )

    def state_formulas(self) -> Formulas:
        return (
            ("wersa", "G*D*(v + 1)"),
            ("short convolutions", "(W - 1)*H*k" if self.conv_size else ""),
            ("open block", "(H + G)*k*(wave - 1)"),
        )

    def flops_formulas(self, chunked: bool) -> Formulas:
        return (*self.steps(random_features="2*(H + G)*k*D"), *super().flops_formulas(chunked))

    def describe(self) -> str:
        return f"wersa, {self.random_features:,} features"
