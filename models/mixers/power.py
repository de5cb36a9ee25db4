"""Power attention, and linear attention as its degree 1, by powerplan.kernels.

Shapes: B batch, T tokens, H query heads, G key/value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from powerplan.dims import KERNEL_DEGREES
from powerplan.errors import InputError
from powerplan.kernels import PowerState, power_attention, power_attention_step
from powerplan.mixers import FeatureAttention
from powerplan.models.mixers.base import check_kernel_settings
from powerplan.models.mixers.heads import GroupedHeadsMixer
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: PowerState | None,
    *,
    return_state: bool,
    p: int,
    normalize: bool,
    **options: Any,
) -> tuple[Tensor, PowerState | None]:
    """Return power attention [B, T, H, V] and, on demand, the state after it; one token after a state is a step.

    q: [B, T, H, K]. k: [B, T, G, K]. v: [B, T, G, V]. log_g: [B, T, G]. state: that of the tokens before.
    p, normalize, options: as `power_attention` takes them.
    """
    if state is not None and q.shape[1] == 1:
        own = None if log_g is None else log_g[:, 0]
        out, state = power_attention_step(q[:, 0], k[:, 0], v[:, 0], own, state, p=p, normalize=normalize)
        return out[:, None], state
    options |= {"p": p, "normalize": normalize}
    if not return_state:
        return power_attention(q, k, v, log_g, **options), None
    out, state = power_attention(q, k, v, log_g, initial_state=state, return_state=True, **options)
    return out, state


def attend_shared(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cp: ContextParallel, *, return_state: bool, **options: Any
) -> tuple[Tensor, PowerState | None]:
    """Return the same where each rank of a plan has some of the tokens; the state is that of all of them."""
    if not return_state:
        return power_attention(q, k, v, log_g, cp=cp, **options), None
    out, state = power_attention(q, k, v, log_g, cp=cp, return_state=True, **options)
    return out, state


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
        if mixer.degree not in KERNEL_DEGREES:
            raise InputError(f"p={mixer.degree}: the kernels run degrees {KERNEL_DEGREES[0]} to {KERNEL_DEGREES[-1]}")
        if mixer.degree % 2 and mixer.has_normaliser:
            raise InputError(f"p={mixer.degree} needs normalize: false: weights of odd degrees have both signs")
        check_kernel_settings(impl)
        self.options: dict[str, Any] = {"p": mixer.degree, "normalize": mixer.has_normaliser}
        self.options |= {"chunk_size": mixer.chunk_size, "impl": impl}

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        return attend(q, k, v, log_g, state, return_state=return_state, **self.options)

    def mix_shared(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        return attend_shared(q, k, v, log_g, cp, return_state=return_state, **self.options)
