"""What one call of power attention is made of: its shape and settings, its tensors, and what it returns.

Letters of shapes, here and in all of kernels/:

    B     rows of the batch
    T     tokens of a row
    N     sequences: B, or those that are packed into one row
    H     query heads
    G     key/value heads
    R     query heads to each key/value head, H / G
    K, V  head dims of keys (and queries) and of values
    D     entries of phi
    W     columns of a state: V, and one more for the normaliser if there is one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from powerplan.kernels.tiles import PHI_BLOCK_ROWS, TILE, Tiling, tiling

LOWEST_LOG_GATE = -100.0
"""The lowest log_g that counts; lower ones, -inf included, count as this one.

exp(-100) = 4e-44 leaves nothing of the past in any dtype, and the sums of these gates stay finite.
"""

SMALLEST_NORM = 2.0**-126
"""The least normal number of float32. Sums of weights below it have lost digits, and count as 0."""


@dataclass(frozen=True)
class CallShape:
    """Shape and settings of one call: everything below `power_attention` reads them here.

    Attributes:
        p: Degree of the attention.
        scale: Factor on q.k.
        chunk_size: Tokens per chunk, for the chunked engines.
        normalize: Whether sums are divided by the sum of their weights.
        batch: B, rows of the batch; packed sequences lie in one row.
        tokens: T, tokens of a row.
        heads: H, query heads.
        kv_heads: G, key/value heads.
        head_dim: K, dimension of a query and of a key.
        v_head_dim: V, dimension of a value.
    """

    p: int
    scale: float
    chunk_size: int
    normalize: bool
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int

    @staticmethod
    def of(
        q: Sequence[int], k: Sequence[int], v: Sequence[int], p: int, scale: float, chunk_size: int, normalize: bool
    ) -> CallShape:
        """Return the shape of a call on tensors of the sizes q [B, T, H, K], k [B, T, G, K] and v [B, T, G, V].

        Head dims become constants of a graph that is traced, as phi's dimension does; batch and time may stay symbolic.
        """
        batch, tokens, kv_heads, head_dim = k
        return CallShape(p, scale, chunk_size, normalize, batch, tokens, q[2], kv_heads, int(head_dim), int(v[3]))

    # Cached, since every step of the torch engine reads them: without it a call makes a tenth more Python calls.
    @cached_property
    def heads_per_kv_head(self) -> int:
        """R, the query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @cached_property
    def state_columns(self) -> int:
        """W, the columns of a state: the values' dims, and one for the normaliser."""
        return self.v_head_dim + int(self.normalize)

    @cached_property
    def state_count(self) -> int:
        """B G, the states of all rows and key/value heads."""
        return self.batch * self.kv_heads

    @property
    def tile(self) -> int:
        """Features of a tile of the torch engine: no more than there are."""
        return min(TILE, self.head_dim)

    @cached_property
    def padded_head_dim(self) -> int:
        """K padded to whole tiles, for the torch engine."""
        return -(-self.head_dim // self.tile) * self.tile

    @cached_property
    def tiling(self) -> Tiling:
        """The torch engine's layout of phi."""
        return tiling(self.padded_head_dim, self.p, self.tile, PHI_BLOCK_ROWS)

    def chunks(self) -> list[slice]:
        """Return the tokens of each chunk of a row; the last may be shorter."""
        size = self.chunk_size
        return [slice(start, min(start + size, self.tokens)) for start in range(0, self.tokens, size)]


class Inputs(NamedTuple):
    """The tensors that a call attends with; an initial state stands beside them.

    q: [B, T, H, K]
    k: [B, T, G, K]
    v: [B, T, G, V]
    log_g: [B, T, G], natural logarithms of the gates; None without gates
    cu_seqlens: [N + 1], where packed sequences begin and end; None where each row of the batch is a sequence
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_g: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def sequences(self) -> int:
        """N, the number of sequences."""
        return self.k.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def with_finite_gates(self) -> Inputs:
        """Return the inputs with gates of at least LOWEST_LOG_GATE."""
        return self if self.log_g is None else self._replace(log_g=self.log_g.clamp(min=LOWEST_LOG_GATE))

    def at(self, tokens: slice) -> Inputs:
        """Return these tokens of every row, as sequences that are not packed."""
        log_g = None if self.log_g is None else self.log_g[:, tokens]
        return Inputs(self.q[:, tokens], self.k[:, tokens], self.v[:, tokens], log_g)


class Outputs(NamedTuple):
    """What a chunked forward pass returns, and what its backward pass needs of it.

    out: [B, T, H, V]
    norm: [B, T, H], sums of weights; no columns without a normaliser
    final_state: [N, G, D, W] in the layout of PowerState, the normaliser its last column; None where it is not wanted
    saved_states: states before some of the chunks, in the engine's own layout
    saved_keys: their normalisers, where the engine keeps these apart; None where it does not
    scales: [N, G, 3], exponents of the scales that norm and these have (triton/hopper/float16.py); None without scales
    """

    out: Tensor
    norm: Tensor
    final_state: Tensor | None
    saved_states: Tensor
    saved_keys: Tensor | None = None
    scales: Tensor | None = None


class Gradients(NamedTuple):
    """What a backward pass returns.

    q: [B, T, H, K]
    k: [B, T, G, K]
    v: [B, T, G, V]
    log_g: [B, T, G], None without gates
    initial_state: [N, G, D, W], None where there was none
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_g: Tensor | None
    initial_state: Tensor | None
