"""Power attention, and linear attention as its degree 1, by powerplan.kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from powerplan.kernels import power_attention
from powerplan.mixers import FeatureAttention
from powerplan.models.mixers.heads import HeadedMixer


class PowerAttention(HeadedMixer):
    """Power attention of the mixer's degree, gated and normalised as the mixer says; linear is p = 1."""

    def __init__(
        self, mixer: FeatureAttention, hidden: int, *, rope: bool, impl: str = "auto", **settings: Any
    ) -> None:
        super().__init__(mixer, hidden, rope=rope, **settings)
        self.p, self.normalize = mixer.degree, mixer.has_normaliser
        self.chunk_size, self.impl = mixer.chunk_size, impl

    def mix(self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> Tensor:
        settings: dict[str, Any] = {"p": self.p, "normalize": self.normalize, "chunk_size": self.chunk_size}
        out: Tensor = power_attention(q, k, v, log_g, impl=self.impl, **settings)  # type: ignore[assignment]
        return out
