"""Gated slot attention (Zhang et al. 2024, arXiv 2409.07146, section 3), as two passes of gated linear attention.

Every head has M slots with a key and a value each. A token keeps exp(log_f) of each slot and fills the rest with its
own key and value. A query reads the values by the softmax of its products with the slots' keys.

Shapes: B batch, T tokens, m hidden size, H heads, K key head dim, V value head dim, M slots, n chunks of C tokens. The
slots are computed in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.kernels.distributed.recurrence import Recurrence, recur
from powerplan.mixers import GSA
from powerplan.models.mixers.fla import fla_supports, slots_by_fla
from powerplan.models.mixers.matrix import MatrixMixer
from powerplan.models.mixers.recurrence import (
    MIN_LOG_G,
    DecayedProducts,
    full_and_rest,
    gated_linear_state,
    no_autocast,
)

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute gated slot attention in chunks.

    Half precision on CUDA goes through flash-linear-attention where that is installed.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_f: Natural logarithms of what each slot keeps [B, T, H, M], at most 0.
        state: Keys and values of the slots [B, H, M, K + V] after the tokens before these; None if there are none.
        chunk_size: Tokens per chunk.

    Returns:
        Outputs [B, T, H, V] in the dtype of v, and the slots [B, H, M, K + V] after the last token.
    """
    if fla_supports(q, v, log_f.shape[-1]):
        return slots_by_fla(q, k, v, log_f.clamp(min=MIN_LOG_G[torch.float32]), state)
    dtype, length = torch.promote_types(q.dtype, torch.float32), q.shape[1]
    inputs = [x.transpose(1, 2).to(dtype) for x in (q, k, v, log_f)]
    outs = []
    with no_autocast(q):
        for start, stop, size in full_and_rest(length, min(chunk_size, length)):
            out, state = _chunks(*(torch.unflatten(x[:, :, start:stop], 2, (-1, size)) for x in inputs), state=state)
            outs.append(out.flatten(2, 3))
    assert state is not None
    return torch.cat(outs, 2).transpose(1, 2).to(v.dtype), state


def _chunks(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, *, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the outputs [B, H, n, C, V] of n chunks, and the slots after them."""
    log_f = log_f.clamp(min=MIN_LOG_G[log_f.dtype])
    cumsum = log_f.cumsum(-2)
    total, from_start = cumsum[..., -1:, :], cumsum.exp()
    written = -torch.expm1(log_f)
    products = DecayedProducts(written, cumsum)
    updates = (written * (total - cumsum).exp()).mT @ torch.cat((k, v), -1)
    chunk_decay, before = total.exp().mT, []
    for index in range(k.shape[2]):
        if state is not None:
            before.append(state)
        update = updates[:, :, index]
        state = update if state is None else chunk_decay[:, :, index] * state + update
    assert state is not None
    sizes = [k.shape[-1], v.shape[-1]]
    slots = products.sum_keys((q @ k.mT).tril())
    first = k.shape[2] - len(before)  # 1 where no state came before the first chunk, else 0
    keys, values = torch.split(torch.stack(before, 2), sizes, -1) if before else (None, None)
    if keys is not None:
        late = slots[:, :, first:] + (q[:, :, first:] @ keys.mT) * from_start[:, :, first:]
        slots = torch.cat((slots[:, :, :first], late), 2)
    read = slots.softmax(-1)
    out = products.with_keys(read).tril() @ v
    if values is not None:
        late = out[:, :, first:] + (read * from_start)[:, :, first:] @ values
        out = torch.cat((out[:, :, :first], late), 2)
    return out, state


def slots_left_behind(k: Tensor, v: Tensor, log_f: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return the slots that tokens leave behind, without queries.

    They are gated linear attention, whose keys are what a token writes to each slot. The slots after tokens that follow
    others are their own plus their transition times the slots before.

    Args:
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_f: Natural logarithms of what each slot keeps [B, T, H, M], at most 0.
        chunk_size: Tokens per chunk.

    Returns:
        The slots [B, H, M, K + V], and the transition [B, H, M, 1].
    """
    log_f = log_f.clamp(min=MIN_LOG_G[log_f.dtype])
    return gated_linear_state(-torch.expm1(log_f), torch.cat((k, v), -1), log_f, chunk_size)


def slot_step(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Process one more token.

    Args:
        q: [B, H, K].
        k: [B, H, K].
        v: [B, H, V].
        log_f: Natural logarithms of what each slot keeps [B, H, M].
        state: Keys and values of the slots [B, H, M, K + V] after the tokens before this one.

    Returns:
        The output [B, H, V] in the dtype of v, and the slots after this token.
    """
    dtype, out_dtype = state.dtype, v.dtype
    log_f = log_f.to(dtype).clamp(min=MIN_LOG_G[dtype])[..., None]
    with no_autocast(state):
        state = log_f.exp() * state - torch.expm1(log_f) @ torch.cat((k, v), -1).to(dtype)[..., None, :]
        keys, values = torch.split(state, [k.shape[-1], v.shape[-1]], -1)
        read = (q.to(dtype)[..., None, :] @ keys.mT).softmax(-1)
        return (read @ values).squeeze(-2).to(out_dtype), state


class GatedSlotAttention(MatrixMixer):
    """Gated slot attention, SiLU on queries, keys, values and outputs as in flash-linear-attention (layers/gsa.py)."""

    activated = True
    temperature = 8.0
    """Log gates are divided by this number, so that the slots are filled slowly."""

    def __init__(self, mixer: GSA, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, **factory_kwargs)
        self.forget = nn.Linear(hidden_size, mixer.heads * mixer.slots, bias=False, **factory_kwargs)

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, past_tokens: int, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        log_f = self.log_kept(x)
        if state is not None and x.shape[1] == 1:
            out, state = slot_step(q[:, 0], k[:, 0], v[:, 0], log_f[:, 0], state)
            out = out[:, None]
        else:
            out, state = slot_attention(q, k, v, log_f, state, self.chunk_size)
        return F.silu(out), state

    def log_kept(self, x: Tensor) -> Tensor:
        """Return the natural logarithms of what each slot keeps, [B, T, H, M]."""
        forget = self.forget(x).unflatten(-1, (self.heads, -1))
        return F.logsigmoid(forget.to(torch.promote_types(forget.dtype, torch.float32))) / self.temperature

    def mix_shared(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        def state_of(own: Any, _: int, __: bool) -> tuple[Tensor, Tensor]:
            return slots_left_behind(own["k"], own["v"], own["log_f"], self.chunk_size)

        def run(own: Any, _: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return slot_attention(**own, state=state, chunk_size=self.chunk_size)

        log_f = self.log_kept(x)
        state_size = (self.heads, log_f.shape[-1], self.head_dim + self.v_head_dim)
        recurrence = Recurrence(type(self).__name__, state_size, (log_f.shape[-1], 1), state_of, run)
        tensors = {"q": q, "k": k, "v": v, "log_f": log_f}
        out, final = recur(cp, recurrence, tensors, return_state=return_state)
        return F.silu(out), final
