"""Linear attention with a fixed decay per head, RetNet's and lightning attention's, by powerplan.kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from powerplan.mixers import Lightning, RetNet
from powerplan.models.mixers.base import check_kernel_settings
from powerplan.models.mixers.matrix import MatrixMixer
from powerplan.models.mixers.power import attend, attend_shared
from powerplan.models.mixers.ranks import rope_of_rank
from powerplan.models.rope import apply_rope, rope_cos_sin
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class FixedDecay(MatrixMixer):
    """Linear attention whose state is multiplied by exp(`log_decay`) at every token: power attention of degree 1."""

    def __init__(
        self,
        mixer: RetNet | Lightning,
        hidden_size: int,
        *,
        rope: Rope | None = None,
        impl: str = "auto",
        **factory_kwargs: Any,
    ) -> None:
        super().__init__(mixer, hidden_size, **factory_kwargs)
        check_kernel_settings(impl)
        self.rope = rope
        self.options: dict[str, Any] = {"p": 1, "normalize": False, "chunk_size": self.chunk_size, "impl": impl}

    def log_decay(self, device: torch.device) -> Tensor:
        """Return the natural logarithms of the decays per token [H], float32, below 0."""
        raise NotImplementedError

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, past_tokens: int, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        if self.rope is not None:
            cos_sin = rope_cos_sin(past_tokens, x.shape[1], self.head_dim, x.device, self.rope)
            q, k = apply_rope(q, *cos_sin), apply_rope(k, *cos_sin)
        log_g = self.log_decay(x.device).expand(*x.shape[:2], -1)
        return attend(q, k, v, log_g, state, return_state=return_state, **self.options)

    def mix_shared(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        if self.rope is not None:
            cos_sin = rope_of_rank(cp, self.head_dim, q.device, self.rope)
            q, k = apply_rope(q, *cos_sin), apply_rope(k, *cos_sin)
        log_g = self.log_decay(q.device).expand(*q.shape[:2], -1)
        return attend_shared(q, k, v, log_g, cp, return_state=return_state, **self.options)


class Retention(FixedDecay):
    """Multi-scale retention with a SiLU gate: decay 1 - 2^(-5 - h) of head h, from 0 (arXiv 2307.08621, equation 8)."""

    def log_decay(self, device: torch.device) -> Tensor:
        heads = torch.arange(self.heads, device=device, dtype=torch.float32)
        return torch.log1p(-torch.exp2(-5 - heads))


class LightningAttention(FixedDecay):
    """Lightning attention: SiLU on queries, keys and values, sigmoid gate, no positions (MiniMax-01, section 2.2).

    Head h, from 0, has the decay exp(-2^(-8 (h + 1) / H)): the slopes of ALiBi. All layers have the same decays here;
    those of MiniMax-01 get weaker with depth.
    """

    activated = True
    sigmoid_gate = True

    def log_decay(self, device: torch.device) -> Tensor:
        heads = torch.arange(1, self.heads + 1, device=device, dtype=torch.float32)
        return -torch.exp2(-8 * heads / self.heads)
