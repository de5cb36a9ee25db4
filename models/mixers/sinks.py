"""Softmax attention with a sink: a logit per query head that joins the softmax and has no value (gpt-oss).

Let L be the log-sum-exp of a query's scores, s the sink, and exp(L') = exp(L) + exp(s). The output with the sink is
exp(L - L') times the output without it. Flash attention returns L, so no T x S weights are needed. Its backward pass
takes the output and L. Given the output with the sink and L', it returns the right gradients: it only uses the sum of
weights times their gradients, and the sink adds 0 to that sum because it has no value.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable


def sdpa_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Compute softmax attention by torch's SDPA, with sinks or without.

    With sinks, a CPU keeps no T x S weights; there K and V are padded to the larger of them. A GPU keeps them: models
    use this function there only for a few tokens after a cache.

    Args:
        q: [B, H, T, K].
        k: [B, G, S, K].
        v: [B, G, S, V].
        sinks: Logits [H], or None.
        mask: Bool, broadcast to [B, H, T, S], true where a query sees a key. None masks nothing.
        causal: T is S, and a query does not see the keys after its own.

    Returns:
        Outputs [B, H, T, V].
    """
    repeats = q.shape[1] // k.shape[1]
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=repeats > 1)
    k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
    if q.device.type in ("cpu", "meta"):
        return flash_with_sinks(q, k, v, sinks, mask, causal)
    return all_pairs_with_sinks(q, k, v, sinks, mask, causal)


def rescale_for_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the output with sinks [B, H, T, V] from the one without, `out`, whose scores have the log-sum-exp `lse`.

    lse: [B, H, T]. sinks: [H]. The factor exp(L - L') is sigmoid(L - s).
    """
    return out * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None].to(out.dtype)


def flash_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return attention with sinks by the CPU's flash attention, which needs equal K and V: the smaller is padded."""
    scale, width, v_head_dim = q.shape[-1] ** -0.5, max(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    out: Tensor = _FlashWithSinks.apply(q, k, v, sinks, bias, causal, scale)  # type: ignore[no-untyped-call]
    return out[..., :v_head_dim]


def all_pairs_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return attention with sinks from its definition, with all T x S weights."""
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    sink_scores = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    weights: Tensor = torch.cat((scores, sink_scores), -1).softmax(-1)[..., :-1]
    return weights.to(v.dtype) @ v


class _FlashWithSinks(torch.autograd.Function):
    """The CPU's flash attention with sinks. `bias` is added to the scores.

    The ATen operators are called by their own names because no public function returns the log-sum-exp on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        lse_with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = rescale_for_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse_with_sinks)
        ctx.options = (causal, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, out, lse = ctx.saved_tensors
        causal, scale = ctx.options
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_q, grad_k, grad_v = flash_backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
        # The sink has weight exp(s - L') and value 0, so its gradient is -exp(s - L') <grad, out>, summed over B and T.
        grad_dot_out = (grad * out).sum(-1).to(lse.dtype)
        grad_sinks = -(grad_dot_out * (sinks.to(lse.dtype)[:, None] - lse).exp()).sum((0, 2))
        return grad_q, grad_k, grad_v, grad_sinks.to(sinks.dtype), None, None, None
