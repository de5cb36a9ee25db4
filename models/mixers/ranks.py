"""Tokens of some ranks for heads of others: softmax attention over several ranks (Ulysses, arXiv 2309.14509).

Each rank has some tokens of all heads. One all-to-all gives it all tokens of some heads, over which attention is that
of one process, and another one gives the outputs back. Both are the way back for gradients of the other.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from powerplan.kernels.api import requires_gradient
from powerplan.kernels.distributed.agreement import explained
from powerplan.kernels.distributed.arguments import check_derivatives, check_tokens
from powerplan.models.rope import rope_cos_sin
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


@torch.compiler.disable  # type: ignore[untyped-decorator]
def compare_calls(cp: ContextParallel, kind: str, return_state: bool, **tensors: Tensor) -> None:
    """Check tensors [B, t, ...] whose tokens ranks are about to exchange.

    Args:
        cp: Which rank has which tokens.
        kind: The kind of the mixer.
        return_state: Whether the tokens of all ranks are wanted for a cache.
        **tensors: This rank's tokens.

    Raises:
        ValueError: A tensor has not this rank's tokens, or ranks differ in what they give, on all ranks where the plan
            checks.
    """
    check_derivatives(*tensors.values())
    with cp.agreement.of_errors("the calls"):
        check_tokens(cp, **tensors)
    first = next(iter(tensors.values()))
    values = {
        "mixers": kind,
        "rows": first.shape[0],
        **{f"features of {name}": tuple(x.shape[2:]) for name, x in tensors.items()},
        "dtype": str(first.dtype),
        "return_state": return_state,
        "gradients (recorded or not)": requires_gradient(*tensors.values()),
    }
    cp.agreement.on("the calls", values)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tokens_for_heads(x: Tensor, cp: ContextParallel) -> Tensor:
    """[B, t, H, d], this rank's tokens of all heads -> [B, T, H / ranks, d], all tokens of this rank's heads."""
    swapped: Tensor = _Swap.apply(x, cp, True)  # type: ignore[no-untyped-call]
    return swapped


@torch.compiler.disable  # type: ignore[untyped-decorator]
def heads_for_tokens(x: Tensor, cp: ContextParallel) -> Tensor:
    """[B, T, H / ranks, d], all tokens of this rank's heads -> [B, t, H, d], this rank's tokens of all heads."""
    swapped: Tensor = _Swap.apply(x, cp, False)  # type: ignore[no-untyped-call]
    return swapped


def heads_for_ranks(x: Tensor, ranks: int) -> Tensor:
    """Repeat key/value heads of x [B, t, G, d] until ranks can share them (`can_share`)."""
    return x.repeat_interleave(lcm(x.shape[2], ranks) // x.shape[2], 2)


def can_share(heads: int, kv_heads: int, ranks: int) -> bool:
    """Return whether ranks can have equal parts of the heads, each with the key/value heads that it needs."""
    return heads % lcm(kv_heads, ranks) == 0


def swapped_numbers(
    cp: ContextParallel, heads: int, kv_heads: int, head_dim: int, v_head_dim: int, gates: int = 0
) -> int:
    """Return how many numbers all ranks together send each other for a row: queries, keys, values and outputs, of which
    each rank keeps those of its own heads, and the gates of heads."""
    shared = lcm(kv_heads, cp.ranks)
    each = heads * (head_dim + v_head_dim) + shared * (head_dim + v_head_dim) + gates
    return cp.layout.tokens * each * (cp.ranks - 1) // cp.ranks


def rope_of_rank(cp: ContextParallel, head_dim: int, device: torch.device, rope: Rope) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of this rank's tokens at their places in their sequences, [t, rotated // 2] each."""
    parts = [
        rope_cos_sin(first, own.stop - own.start, head_dim, device, rope, context) for own, first, context in cp.parts()
    ]
    cos, sin = zip(*parts or [rope_cos_sin(0, 0, head_dim, device, rope, 1)], strict=True)
    return torch.cat(cos), torch.cat(sin)


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cp: ContextParallel, to_heads: bool) -> Tensor:
        ctx.cp, ctx.to_heads = cp, to_heads
        return _to_heads(x, cp) if to_heads else _to_tokens(x, cp)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _to_tokens(grad, ctx.cp) if ctx.to_heads else _to_heads(grad, ctx.cp), None, None


def _to_heads(x: Tensor, cp: ContextParallel) -> Tensor:
    batch, tokens, heads, dim = x.shape
    own = heads // cp.ranks
    sent = x.reshape(batch, tokens, cp.ranks, own, dim).permute(2, 1, 0, 3, 4).reshape(-1, batch, own, dim)
    arrived = _all_to_all(sent, [tokens] * cp.ranks, _counts(cp), cp)
    whole = torch.empty_like(arrived)
    whole[_order(cp, x.device)] = arrived
    return whole.transpose(0, 1)


def _to_tokens(x: Tensor, cp: ContextParallel) -> Tensor:
    batch, _, own, dim = x.shape
    sent = x.transpose(0, 1)[_order(cp, x.device)]
    arrived = _all_to_all(sent, _counts(cp), [cp.local_tokens] * cp.ranks, cp)
    split = arrived.view(cp.ranks, cp.local_tokens, batch, own, dim)
    return split.permute(2, 1, 0, 3, 4).reshape(batch, cp.local_tokens, cp.ranks * own, dim)


def _all_to_all(sent: Tensor, send: list[int], receive: list[int], cp: ContextParallel) -> Tensor:
    arrived = sent.new_empty(sum(receive), *sent.shape[1:])
    with explained(cp.rank, cp.ranks):
        dist.all_to_all_single(arrived, sent.contiguous(), receive, send, group=cp.group)
    return arrived


def _counts(cp: ContextParallel) -> list[int]:
    return [sum(stop - start for start, stop in ranges) for ranges in cp.layout.ranges]


def _order(cp: ContextParallel, device: torch.device) -> Tensor:
    """Return the tokens of all ranks, rank after rank, [T] int64."""
    ranges = [one for ranges in cp.layout.ranges for one in ranges]
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])
