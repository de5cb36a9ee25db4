"""Power attention, and linear attention as its degree 1, by powerplan.kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from powerplan.errors import InputError
from powerplan.kernels import power_attention, power_attention_step
from powerplan.kernels.api import DEGREES
from powerplan.mixers import FeatureAttention
from powerplan.models.mixers.heads import HeadedMixer


class PowerAttention(HeadedMixer):
    """Power attention of the mixer's degree, gated and normalised as the mixer says; linear is p = 1."""

    def __init__(
        self, mixer: FeatureAttention, hidden: int, *, rope: bool, impl: str = "auto", **settings: Any
    ) -> None:
        super().__init__(mixer, hidden, rope=rope, **settings)
        if mixer.degree not in DEGREES:
            raise InputError(f"p={mixer.degree}: the kernels run degrees {DEGREES[0]} to {DEGREES[-1]}")
        if mixer.degree % 2 and mixer.has_normaliser:
            raise InputError(f"p={mixer.degree} needs normalize: false: weights of odd degrees have both signs")
        self.p, self.normalize = mixer.degree, mixer.has_normaliser
        self.chunk_size, self.impl = mixer.chunk_size, impl

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Any, *, keep: bool
    ) -> tuple[Tensor, Any]:
        settings: dict[str, Any] = {"p": self.p, "normalize": self.normalize}
        if state is not None and q.shape[1] == 1:
            last = None if log_g is None else log_g[:, 0]
            out, state = power_attention_step(q[:, 0], k[:, 0], v[:, 0], last, state, **settings)
            return out[:, None], state
        settings |= {"chunk_size": self.chunk_size, "impl": self.impl}
        if not keep:
            whole: Tensor = power_attention(q, k, v, log_g, **settings)  # type: ignore[assignment]
            return whole, None
        return power_attention(q, k, v, log_g, initial_state=state, return_state=True, **settings)  # type: ignore[return-value]
