"""Softmax attention with a sink: a logit per query head that joins the softmax and has no value (gpt-oss).

With the log-sum-exp L of a query's scores and the sink s, its output is exp(L - L') times the one without, where
exp(L') = exp(L) + exp(s). Flash kernels give L; their backward pass takes the output and L', and is right with these,
since the sink adds nothing to the products of values and gradients that it sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return softmax attention [B, H, T, V] of q [B, H, T, K] over k [B, G, S, K], v [B, G, S, V] by torch's SDPA.

    mask: [T, S], true where a query sees a key; causal: T is S, and keys after the query are not seen. sinks: [H].
    With sinks a CPU keeps no T x S weights either, K and V padded to the larger of them.
    """
    groups = q.shape[1] // k.shape[1]
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    if q.device.type in ("cpu", "meta"):
        return _by_flash(q, k, v, sinks, mask, causal)
    return _by_definition(q, k, v, sinks, mask, causal)


def rescaled(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return out [B, H, T, V], whose scores have the log-sum-exp `lse` [B, H, T], as with sinks [H] beside them."""
    return out * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None].to(out.dtype)


def _by_flash(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scale, width, values = q.shape[-1] ** -0.5, max(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    added = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    out: Tensor = _Flash.apply(q, k, v, sinks, added, causal, scale)  # type: ignore[no-untyped-call]
    return out[..., :values]


def _by_definition(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    weights: Tensor = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return weights.to(v.dtype) @ v


class _Flash(torch.autograd.Function):
    """Torch's flash attention of the CPU, with sinks; the mask is added to the scores."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = run(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = rescaled(out, lse, sinks)
        ctx.save_for_backward(q, k, v, sinks, mask, out, whole)
        ctx.settings = (causal, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, mask, out, whole = ctx.saved_tensors
        causal, scale = ctx.settings
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = run(grad, q, k, v, out, whole, 0.0, causal, attn_mask=mask, scale=scale)
        reach = (grad * out).sum(-1).to(whole.dtype)
        sink = -(reach * (sinks.to(whole.dtype)[:, None] - whole).exp()).sum((0, 2))
        return dq, dk, dv, sink.to(sinks.dtype), None, None, None
