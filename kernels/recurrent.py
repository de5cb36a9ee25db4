"""Power attention token by token: the recurrence that decoding uses, slow for whole sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from powerplan.kernels.embedding import spow
from powerplan.kernels.state import PowerState, divisor


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: PowerState,
    *,
    p: int,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, PowerState]:
    """Return the output of one token, [N, H, V], and the state after it. q [N, H, K], k [N, G, K], v [N, G, V]."""
    groups, dtype = k.shape[1], state.kv.dtype
    features = spow(k.to(dtype), p)  # [N, G, D]
    decay = torch.ones(k.shape[:2], dtype=dtype, device=k.device) if log_g is None else log_g.to(dtype).exp()
    # [N, G, D, 1] * [N, G, 1, V] -> [N, G, D, V]
    kv = decay[..., None, None] * state.kv + features[..., None] * v.to(dtype)[:, :, None]
    asked = spow(q.to(dtype).view(q.shape[0], groups, -1, q.shape[2]), p) * scale**p  # [N, G, R, D]
    total = asked @ kv  # [N, G, R, D] @ [N, G, D, V] -> [N, G, R, V]
    key = None
    if normalize and state.key is not None:
        key = decay[..., None] * state.key + features
        norm = asked @ key[..., None]
        total = total / divisor(norm)
    return total.flatten(1, 2).to(v.dtype), PowerState(kv, key)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: PowerState,
    *,
    p: int,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, PowerState]:
    """Return the output, [N, T, H, V], and the final state, one `step` after another."""
    outs = []
    for token in range(q.shape[1]):
        gate = None if log_g is None else log_g[:, token]
        out, state = step(q[:, token], k[:, token], v[:, token], gate, state, p=p, scale=scale, normalize=normalize)
        outs.append(out)
    return torch.stack(outs, 1), state
