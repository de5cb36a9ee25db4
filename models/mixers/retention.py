"""Linear attention with a fixed decay per head, RetNet's and lightning attention's, by powerplan.kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerplan.kernels import power_attention, power_attention_step
from powerplan.mixers import Lightning, RetNet
from powerplan.models.mixers.matrix import MatrixMixer
from powerplan.models.rope import angles, rotate


class FixedDecay(MatrixMixer):
    """Linear attention whose state shrinks by exp(`log_decay`) at every token: power attention of degree 1, gated."""

    def __init__(
        self, mixer: RetNet | Lightning, hidden: int, *, rope: bool = False, impl: str = "auto", **settings: Any
    ) -> None:
        super().__init__(mixer, hidden, **settings)
        self.rope, self.impl = rope, impl

    def log_decay(self, device: torch.device) -> Tensor:
        """Return the logarithms [H] of the decays, in float32."""
        raise NotImplementedError

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: int, memory: Any, *, keep: bool
    ) -> tuple[Tensor, Any]:
        if self.rope:
            turns = angles(seen, x.shape[1], self.head_dim, x.device)
            q, k = rotate(q, *turns), rotate(k, *turns)
        log_g = self.log_decay(x.device).expand(*x.shape[:2], -1)
        settings: dict[str, Any] = {"p": 1, "normalize": False}
        if memory is not None and x.shape[1] == 1:
            out, memory = power_attention_step(q[:, 0], k[:, 0], v[:, 0], log_g[:, 0], memory, **settings)
            return out[:, None], memory
        settings |= {"chunk_size": self.chunk_size, "impl": self.impl}
        if not keep:
            whole: Tensor = power_attention(q, k, v, log_g, **settings)  # type: ignore[assignment]
            return whole, None
        return power_attention(q, k, v, log_g, initial_state=memory, return_state=True, **settings)  # type: ignore[return-value]


class Retention(FixedDecay):
    """Multi-scale retention: decay 1 - 2^(-5 - h) of head h, SiLU gate (arXiv 2307.08621, equation 8)."""

    def log_decay(self, device: torch.device) -> Tensor:
        heads = torch.arange(self.heads, device=device, dtype=torch.float32)
        return torch.log1p(-torch.exp2(-5 - heads))


class LightningAttention(FixedDecay):
    """Lightning attention: SiLU on queries, keys and values, sigmoid gate, no positions (MiniMax-01, section 2.2).

    Decay exp(-2^(-8 (h + 1) / H)) of head h: ALiBi's slopes, the same in all layers, where MiniMax-01 lowers them with
    depth.
    """

    activated = True
    sigmoid_gate = True

    def log_decay(self, device: torch.device) -> Tensor:
        heads = torch.arange(1, self.heads + 1, device=device, dtype=torch.float32)
        return -torch.exp2(-8 * heads / self.heads)
