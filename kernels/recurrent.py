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
    queries = (q.to(dtype) * scale).view(q.shape[0], groups, -1, q.shape[2])  # [N, G, R, K]
    embedded = spow(torch.cat((k.to(dtype)[:, :, None], queries), 2), p)  # [N, G, 1 + R, D]
    features, asked = embedded[:, :, 0], embedded[:, :, 1:]
    decay = None if log_g is None else log_g.to(dtype).exp()[..., None]  # [N, G, 1]
    # [N, G, D, V] + [N, G, D, 1] * [N, G, 1, V]: the state is most of what a step reads and writes, hence one pass.
    factors = features[..., None], v.to(dtype)[:, :, None]
    kv = state.kv.addcmul(*factors) if decay is None else (state.kv * decay[..., None]).addcmul_(*factors)
    total = asked @ kv  # [N, G, R, D] @ [N, G, D, V] -> [N, G, R, V]
    key = None
    if normalize and state.key is not None:
        key = features + (state.key if decay is None else state.key * decay)
        total = total / divisor(asked @ key[..., None])
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
