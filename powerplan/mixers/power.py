"""Power attention of degree p, and linear attention, which is its case p = 1 without the normaliser."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, ClassVar

import msgspec

from powerplan.dims import KERNEL_DEGREES, default_chunk_size, spow_dim, tiled_spow_dim
from powerplan.mixers.base import Convention, Mixer, Rational, Size, StateSize, Term, Window, mean_keys_in_chunks, term
from powerplan.mixers.heads import GroupedHeads

MAX_DEGREE = 16
"""Highest degree accepted; at d = 64 its state has 10^16 elements per head, past any use."""


class FeatureAttention(GroupedHeads, frozen=True, kw_only=True):
    """Attention through a feature map phi of dimension D: state G D (v + z), with z = 1 where a normaliser is kept.

    parameters in matmuls: GQA's, plus mG for the gate (one log-gate per key/value head, with a bias where `bias`)
    recurrent form, FLOPs per token: 2HD(v + z) to query the state and 2GD(v + z) to update it
    chunked form: D of the tiled embedding, no query in the first (empty) chunk, plus 2H(k + v) mean_keys in chunks
    """

    chunked_differs: ClassVar[bool] = True

    gated: bool = False
    chunk_size: Window | None = None

    @property
    def degree(self) -> int:
        raise NotImplementedError

    @property
    def has_normaliser(self) -> bool:
        raise NotImplementedError

    @property
    def executed_dim(self) -> int:
        """Dimension of phi as a chunked kernel executes it."""
        raise NotImplementedError

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        terms = super().matmul_terms(hidden)
        return (*terms, term("gate", "m*G", self.head_symbols(hidden))) if self.gated else terms

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        terms = super().other_terms(hidden)
        return (*terms, term("biases", "G", self.head_symbols(hidden))) if self.gated and self.bias else terms

    def effective_chunk_size(self) -> int:
        """Return the chunk of the spec, or the kernels' default for this head dim and degree."""
        return self.chunk_size or default_chunk_size(self.head_dim, self.degree)

    def chunk_size_or_default(self) -> int:
        return self.effective_chunk_size()

    def features_size(self) -> StateSize:
        features = self.kv_heads * spow_dim(self.head_dim, self.degree) * self.v_head_dim
        return StateSize(recurrent=features, entry=self.kv_heads * (self.head_dim + self.v_head_dim))

    @classmethod
    def relatives(cls) -> type[Mixer]:
        """Power and linear attention have gates and chunks in common."""
        return FeatureAttention

    def feature_symbols(self, dim: int) -> dict[str, Rational]:
        normaliser = int(self.has_normaliser)
        return {"H": self.heads, "G": self.kv_heads, "D": dim, "v": self.v_head_dim, "z": normaliser}

    def state_terms(self, context: int) -> tuple[Term, ...]:
        return (term(self.describe(), "G*D*(v + z)", self.feature_symbols(spow_dim(self.head_dim, self.degree))),)

    def state_size(self, context: int) -> StateSize:
        columns = self.v_head_dim + int(self.has_normaliser)
        return StateSize(recurrent=self.kv_heads * spow_dim(self.head_dim, self.degree) * columns)

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        query, update = f"{self.describe()}: query state", f"{self.describe()}: update state"
        if convention.form == "recurrent":
            symbols = self.feature_symbols(spow_dim(self.head_dim, self.degree))
            return (term(query, "2*H*D*(v + z)", symbols), term(update, "2*G*D*(v + z)", symbols))
        symbols = self.feature_symbols(self.executed_dim)
        chunk = self.effective_chunk_size()
        late = Fraction(max(0, context - chunk), context)
        within: dict[str, Rational] = {
            "H": self.heads,
            "k": self.head_dim,
            "v": self.v_head_dim,
            "keys": mean_keys_in_chunks(context, convention.causal, chunk),
        }
        return (
            term(query, "2*H*D*(v + z)*late", symbols | {"late": late}),
            term(update, "2*G*D*(v + z)", symbols),
            term(f"{self.describe()}: within chunks", "2*H*(k + v)*keys", within),
        )


class Power(FeatureAttention, frozen=True, kw_only=True, tag_field="kind", tag="power"):
    """Power attention: weights (q.k)^p, D = C(k+p-1, p), so the degree sets the state size without parameters.

    normalize: divide by the sum of weights, one more column of state. tile: block of the tiled embedding, in the
    chunked form.
    """

    source: ClassVar[str] = "Gelada et al. 2025, arXiv 2507.04239, Table 3 (dimensions) and Appendix F (chunked stages)"

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
        if self.p % 2 and self.normalize:
            return "odd degree: kernels need normalize: false (weights of both signs)"
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

    source: ClassVar[str] = "Katharopoulos et al. 2020, arXiv 2006.16236, section 3.4 (recurrent form)"

    @property
    def degree(self) -> int:
        return 1

    @property
    def has_normaliser(self) -> bool:
        return False

    @property
    def executed_dim(self) -> int:
        return self.head_dim

    def describe(self) -> str:
        return "linear"
