"""What mixers with a matrix of state per head share: projections, short convolutions, output norm and gate.

Shapes: B batch, T tokens, m hidden size, H heads, J query and key heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.mixers.linear import MatrixState
from powerplan.models.mixers.base import SequenceMixer, not_shared
from powerplan.models.mixers.convolution import ShortConvolution

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class MatrixMixerState(NamedTuple):
    """The state of the heads, and the last inputs of the short convolutions (None without convolutions)."""

    heads: Any
    conv_inputs: Tensor | None


class MatrixMixer(SequenceMixer):
    """[B, T, m] -> [B, T, m]: project, convolve, `mix` (by the subclass), normalise each head or all, gate.

    The norm has no weights where the mixer's output_norm is "none".
    """

    activated = False
    """Queries, keys and values go through SiLU, without convolutions too."""

    silu_follows = True
    """SiLU follows the short convolutions."""

    sigmoid_gate = False
    """The output gate is a sigmoid and not SiLU."""

    def __init__(self, mixer: MatrixState, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.heads, self.key_heads = mixer.heads, getattr(mixer, "key_heads", mixer.heads)
        self.head_dim, self.v_head_dim = mixer.head_dim, mixer.v_head_dim
        self.chunk_size = mixer.chunk_size
        keys, values = self.key_heads * mixer.head_dim, mixer.heads * mixer.v_head_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False, **factory_kwargs)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False, **factory_kwargs)
        self.v_proj = nn.Linear(hidden_size, values, bias=False, **factory_kwargs)
        self.o_proj = nn.Linear(values, hidden_size, bias=False, **factory_kwargs)
        width = mixer.conv_size
        self.convolution = (
            ShortConvolution(2 * keys + values, width, mixer.conv_bias, **factory_kwargs) if width else None
        )
        self.output_gate = self.build_gate(mixer, hidden_size, **factory_kwargs) if mixer.output_gate else None
        all_heads = mixer.output_norm == "full"
        self.output_norm = nn.RMSNorm(
            values if all_heads else mixer.v_head_dim,
            eps=1e-6,
            elementwise_affine=mixer.output_norm != "none",
            **factory_kwargs,
        )
        self.norms_all_heads = all_heads

    def build_gate(self, mixer: MatrixState, hidden_size: int, **factory_kwargs: Any) -> nn.Module:
        """Return the module [B, T, m] -> [B, T, H V] of the output gate."""
        return nn.Linear(hidden_size, mixer.heads * mixer.v_head_dim, bias=False, **factory_kwargs)

    def run(self, x: Tensor, past_tokens: int, state: Any, *, return_state: bool) -> tuple[Tensor, Any]:
        heads_state, conv_inputs = (None, None) if state is None else state
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.convolution is not None:
            joined, conv_inputs = self.convolution(torch.cat(parts, -1), conv_inputs)
            parts = joined.split([part.shape[-1] for part in parts], -1)
        out, heads_state = self.mix(x, *self.by_heads(*parts), past_tokens, heads_state, return_state=return_state)
        return self.merge(x, out), MatrixMixerState(heads_state, conv_inputs) if return_state else None

    def by_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k [B, T, J, K] and v [B, T, H, V], of features that were projected and convolved."""
        if self.activated or (self.convolution is not None and self.silu_follows):
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = (torch.unflatten(part, -1, (self.key_heads, self.head_dim)) for part in (q, k))
        return q, k, torch.unflatten(v, -1, (self.heads, self.v_head_dim))

    def run_shared(self, x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Any]:
        parts: tuple[Tensor, ...] = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        conv_inputs = None
        if self.convolution is not None:
            joined = torch.cat(parts, -1)
            joined, conv_inputs = self.convolution.run_shared(joined, cp, return_state=return_state)
            parts = torch.split(joined, [part.shape[-1] for part in parts], -1)
        out, heads_state = self.mix_shared(x, *self.by_heads(*parts), cp, return_state=return_state)
        return self.merge(x, out), MatrixMixerState(heads_state, conv_inputs) if return_state else None

    def mix_shared(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        """Return the heads' outputs [B, t, H, V] of this rank's tokens of sequences that lie on several ranks, and the
        heads' state after all of their tokens if `return_state`, the same on every rank.
        """
        raise not_shared(self)

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, past_tokens: int, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        """Return the heads' outputs [B, T, H, V], and their state after these tokens.

        x: [B, T, m], from which gates are made. q, k: [B, T, J, K]. v: [B, T, H, V]. state: what an earlier call
        returned for the tokens before these; None if there are none.
        """
        raise NotImplementedError

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the heads' outputs [B, T, H, V] normalised, gated and back in the hidden size."""
        out = self.output_norm(out.flatten(-2)) if self.norms_all_heads else self.output_norm(out).flatten(-2)
        if self.output_gate is not None:
            gate = self.output_gate(x)
            out = out * (gate.sigmoid() if self.sigmoid_gate else F.silu(gate))
        result: Tensor = self.o_proj(out)
        return result
