"""Power attention by its definition: all pairs of tokens, quadratic in time. In float64 it is the oracle of the tests.

The letters of shapes are those of call.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.embedding import spow
from powerplan.kernels.state import PowerState, divisor


def reference(inputs: Inputs, state: PowerState | None, shape: CallShape) -> tuple[Tensor, PowerState]:
    """Return the output, [N, T, H, V], and the state after the last token.

    Sums of gates are in float64, the state and decays in float32, or float64 for float64 inputs; all else is in the
    inputs' dtype.

    Args:
        inputs: The tensors of the call, not packed.
        state: The state before the first token, or None for an empty one.
        shape: Shape and settings of the call; of these only p, scale and normalize are read.
    """
    q, k, v, log_g, _ = inputs
    p = shape.p
    high = torch.promote_types(q.dtype, torch.float32)
    tokens, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    queries = q.view(*q.shape[:2], kv_heads, heads // kv_heads, -1).permute(0, 2, 3, 1, 4)  # [N, G, R, T, K]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)  # [N, G, T, K], [N, G, T, V]
    if log_g is None:
        log_g_cumsum = torch.zeros(keys.shape[:3], dtype=torch.float64, device=q.device)
    else:
        log_g_cumsum = log_g.double().transpose(1, 2).cumsum(-1)  # [N, G, T]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    exponents = (log_g_cumsum[..., :, None] - log_g_cumsum[..., None, :]).to(high)
    decay = exponents.masked_fill(~causal, -torch.inf).exp()
    # [N, G, R, T, K] @ [N, G, 1, K, T] -> [N, G, R, T, T]
    weights = (shape.scale * queries @ keys[:, :, None].mT) ** p * decay[:, :, None].to(q.dtype)
    total = weights @ values[:, :, None]
    norm = weights.sum(-1)
    decay_to_end = (log_g_cumsum[..., -1:] - log_g_cumsum).to(high).exp()  # [N, G, T]
    features = spow(keys.to(high), p) * decay_to_end[..., None]
    kv, key = features.mT @ values.to(high), features.sum(-2)
    if state is not None:
        decay_since_start = log_g_cumsum.to(high).exp()
        phi = spow(queries.to(high), p) * (shape.scale**p * decay_since_start)[:, :, None, :, None]
        total = total + (phi @ state.kv[:, :, None]).to(q.dtype)
        kv = kv + decay_since_start[..., -1, None, None] * state.kv
        if state.key is not None:
            norm = norm + (phi @ state.key[:, :, None, :, None])[..., 0].to(q.dtype)
            key = key + decay_since_start[..., -1, None] * state.key
    out = total / divisor(norm)[..., None] if shape.normalize else total
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), PowerState(kv, key if shape.normalize else None)
