"""What mixers with a matrix of state per head share: projections, short convolutions, output norm and gate.

Shapes: B batch, T time, m hidden size, H heads, J query and key heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.mixers.linear import MatrixState
from powerplan.models.mixers.base import SequenceMixer
from powerplan.models.mixers.convolution import ShortConvolution


class Kept(NamedTuple):
    """What is remembered: the state of the heads, and the last inputs of the short convolutions if there are any."""

    memory: Any
    recent: Tensor | None


class MatrixMixer(SequenceMixer):
    """[B, T, m] -> [B, T, m]: project, convolve, `mix` (a subclass says how), normalise each head or all, gate.

    The norm has no weights where the mixer's output_norm is "none". `activated` says that queries, keys and values go
    through SiLU even without convolutions (with them they always do), `sigmoid_gate` that the gate is no SiLU.
    """

    activated = False
    sigmoid_gate = False

    def __init__(self, mixer: MatrixState, hidden: int, **settings: Any) -> None:
        super().__init__()
        self.heads, self.key_heads = mixer.heads, getattr(mixer, "key_heads", mixer.heads)
        self.head_dim, self.v_head_dim = mixer.head_dim, mixer.v_head_dim
        self.chunk_size = mixer.chunk_size
        keys, values = self.key_heads * mixer.head_dim, mixer.heads * mixer.v_head_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False, **settings)
        self.k_proj = nn.Linear(hidden, keys, bias=False, **settings)
        self.v_proj = nn.Linear(hidden, values, bias=False, **settings)
        self.o_proj = nn.Linear(values, hidden, bias=False, **settings)
        width = mixer.conv_size
        self.convolution = ShortConvolution(2 * keys + values, width, mixer.conv_bias, **settings) if width else None
        self.output_gate = self.build_gate(mixer, hidden, **settings) if mixer.output_gate else None
        whole = mixer.output_norm == "full"
        self.output_norm = nn.RMSNorm(
            values if whole else mixer.v_head_dim,
            eps=1e-6,
            elementwise_affine=mixer.output_norm != "none",
            **settings,
        )
        self.whole_norm = whole

    def build_gate(self, mixer: MatrixState, hidden: int, **settings: Any) -> nn.Module:
        """Return the module from the hidden state to the gate of all value channels."""
        return nn.Linear(hidden, mixer.heads * mixer.v_head_dim, bias=False, **settings)

    def run(self, x: Tensor, seen: int, state: Any, *, keep: bool) -> tuple[Tensor, Any]:
        memory, recent = (None, None) if state is None else state
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.convolution is not None:
            sizes = [part.shape[-1] for part in (q, k, v)]
            joined, recent = self.convolution(torch.cat((q, k, v), -1), recent)
            q, k, v = joined.split(sizes, -1)
        if self.activated or self.convolution is not None:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = (part.unflatten(-1, (self.key_heads, self.head_dim)) for part in (q, k))
        v = v.unflatten(-1, (self.heads, self.v_head_dim))
        out, memory = self.mix(x, q, k, v, seen, memory, keep=keep)
        return self.merge(x, out), Kept(memory, recent) if keep else None

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: int, memory: Any, *, keep: bool
    ) -> tuple[Tensor, Any]:
        """Return [B, T, H, V], and the memory after these tokens.

        x: [B, T, m], for gates; q, k: [B, T, J, K]; v: [B, T, H, V]; memory: what came before, None for nothing.
        """
        raise NotImplementedError

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the heads' outputs [B, T, H, V] normalised, gated and back in the hidden size."""
        out = self.output_norm(out.flatten(-2)) if self.whole_norm else self.output_norm(out).flatten(-2)
        if self.output_gate is not None:
            gate = self.output_gate(x)
            out = out * (gate.sigmoid() if self.sigmoid_gate else F.silu(gate))
        result: Tensor = self.o_proj(out)
        return result
