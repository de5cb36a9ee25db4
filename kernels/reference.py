"""Power attention as its definition: all pairs, quadratic in time. The oracle, in float64; plain torch in other dtypes.

Shapes: N sequences of T tokens, G key/value heads, R query heads to each, K and V their dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerplan.kernels.embedding import spow
from powerplan.kernels.state import PowerState, divisor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: PowerState | None,
    *,
    p: int,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, PowerState]:
    """Return the output, [N, T, H, V], and the final state. Arguments as `power_attention` hands them on."""
    gates = torch.promote_types(q.dtype, torch.float32)
    tokens, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    queries = q.view(*q.shape[:2], groups, heads // groups, -1).permute(0, 2, 3, 1, 4)  # [N, G, R, T, K]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)  # [N, G, T, K], [N, G, T, V]
    if log_g is None:
        decay = torch.zeros(keys.shape[:3], dtype=gates, device=q.device)
    else:
        decay = log_g.to(gates).transpose(1, 2).cumsum(-1)  # [N, G, T]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    # [N, G, R, T, K] @ [N, G, 1, K, T] -> [N, G, R, T, T]
    weights = (scale * queries @ keys[:, :, None].mT) ** p * between[:, :, None].to(q.dtype)
    total = weights @ values[:, :, None]
    norm = weights.sum(-1)
    remembered = (decay[..., -1:] - decay).exp()  # [N, G, T]
    features = spow(keys.to(gates), p) * remembered[..., None]
    kv, key = features.mT @ values.to(gates), features.sum(-2)
    if state is not None:
        since = decay.exp()
        asked = spow(queries.to(gates), p) * (scale**p * since)[:, :, None, :, None]
        total = total + (asked @ state.kv[:, :, None]).to(q.dtype)
        kv = kv + since[..., -1, None, None] * state.kv
        if state.key is not None:
            norm = norm + (asked @ state.key[:, :, None, :, None])[..., 0].to(q.dtype)
            key = key + since[..., -1, None] * state.key
    out = total / divisor(norm)[..., None] if normalize else total
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), PowerState(kv, key if normalize else None)
