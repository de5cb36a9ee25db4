"""Power attention, and linear attention as its degree 1, by powerplan.kernels.

Shapes: B batch, T tokens, H query heads, G key/value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from powerplan.errors import InputError
from powerplan.kernels import power_attention, power_attention_step
from powerplan.kernels.checks import DEGREES
from powerplan.mixers import FeatureAttention
from powerplan.models.mixers.base import check_kernel_settings
from powerplan.models.mixers.heads import GroupedHeadsMixer
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class PowerAttention(GroupedHeadsMixer):
    """Power attention of the mixer's degree, gated and normalised as the mixer says (arXiv 2507.04239)."""

    def __init__(
        self,
        mixer: FeatureAttention,
        hidden_size: int,
        *,
        rope: Rope | None,
        impl: str = "auto",
        **factory_kwargs: Any,
    ) -> None:
        super().__init__(mixer, hidden_size, rope=rope, **factory_kwargs)
        if mixer.degree not in DEGREES:
            raise InputError(f"p={mixer.degree}: the kernels run degrees {DEGREES[0]} to {DEGREES[-1]}")
        if mixer.degree % 2 and mixer.has_normaliser:
            raise InputError(f"p={mixer.degree} needs normalize: false: weights of odd degrees have both signs")
        self.p, self.normalize = mixer.degree, mixer.has_normaliser
        check_kernel_settings(impl)
        self.chunk_size, self.impl = mixer.chunk_size, impl

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        options: dict[str, Any] = {"p": self.p, "normalize": self.normalize}
        if state is not None and q.shape[1] == 1:
            step_log_g = None if log_g is None else log_g[:, 0]
            out, state = power_attention_step(q[:, 0], k[:, 0], v[:, 0], step_log_g, state, **options)
            return out[:, None], state
        options |= {"chunk_size": self.chunk_size, "impl": self.impl}
        if not return_state:
            whole: Tensor = power_attention(q, k, v, log_g, **options)  # type: ignore[assignment]
            return whole, None
        return power_attention(q, k, v, log_g, initial_state=state, return_state=True, **options)  # type: ignore[return-value]

    def mix_shared(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        options: dict[str, Any] = {"p": self.p, "normalize": self.normalize}
        options |= {"chunk_size": self.chunk_size, "impl": self.impl}
        if return_state:
            return power_attention(q, k, v, log_g, cp=cp, return_state=True, **options)  # type: ignore[return-value]
        return power_attention(q, k, v, log_g, cp=cp, **options), None  # type: ignore[return-value]
