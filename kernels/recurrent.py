"""Power attention token by token: the recurrence that decoding repeats. Slow for whole sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerplan.kernels.call import CallShape, Inputs
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
    """Return the output of one token, [N, H, V] in v's dtype, and the state after it.

    Args:
        q: [N, H, K] queries.
        k: [N, G, K] keys.
        v: [N, G, V] values.
        log_g: [N, G], the natural logarithm of the gates, or None.
        state: The state of the tokens before.
        p: Degree.
        scale: Factor on q.k.
        normalize: Whether to divide by the sum of the weights.
    """
    kv_heads, dtype = k.shape[1], state.kv.dtype
    queries = (q.to(dtype) * scale).view(q.shape[0], kv_heads, -1, q.shape[2])  # [N, G, R, K]
    phi = spow(torch.cat((k.to(dtype)[:, :, None], queries), 2), p)  # [N, G, 1 + R, D]
    phi_of_key, phi_of_queries = phi[:, :, 0], phi[:, :, 1:]
    decay = None if log_g is None else log_g.to(dtype).exp()[..., None]  # [N, G, 1]
    # [N, G, D, V] + [N, G, D, 1] * [N, G, 1, V], in one pass: the state is most of what a step reads and writes.
    factors = phi_of_key[..., None], v.to(dtype)[:, :, None]
    kv = state.kv.addcmul(*factors) if decay is None else (state.kv * decay[..., None]).addcmul_(*factors)
    total = phi_of_queries @ kv  # [N, G, R, D] @ [N, G, D, V] -> [N, G, R, V]
    key = None
    if normalize and state.key is not None:
        key = phi_of_key + (state.key if decay is None else state.key * decay)
        total = total / divisor(phi_of_queries @ key[..., None])
    return total.flatten(1, 2).to(v.dtype), PowerState(kv, key)


def recurrent(inputs: Inputs, state: PowerState, shape: CallShape) -> tuple[Tensor, PowerState]:
    """Return the output, [N, T, H, V], and the state after the last token: one `step` after another.

    Args:
        inputs: The tensors of the call, not packed.
        state: The state before the first token.
        shape: Shape and settings of the call.
    """
    q, k, v, log_g, _ = inputs
    settings: dict[str, Any] = {"p": shape.p, "scale": shape.scale, "normalize": shape.normalize}
    outs = []
    for token in range(q.shape[1]):
        gate = None if log_g is None else log_g[:, token]
        out, state = step(q[:, token], k[:, token], v[:, token], gate, state, **settings)
        outs.append(out)
    return torch.stack(outs, 1), state
