"""The torch engine over rows of one length, or over packed sequences one after another; states in the shared layout."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from powerplan.kernels import chunked
from powerplan.kernels.conversion import Conversion
from powerplan.kernels.plan import EVERY, Plan
from powerplan.kernels.tiles import tile_conversion


def restarts(plan: Plan, sequences: int, packed: bool, with_state: bool) -> tuple[int, int, int, int]:
    """Return the shape of the states to restart from, [pieces, B G, D, W]; enough for packed ones of any lengths."""
    span = plan.chunk * EVERY
    if packed:
        pieces = plan.tokens // span + (sequences if with_state else 0)
    else:
        pieces = (plan.tokens + span - 1) // span - int(not with_state)
    return pieces, plan.batch * plan.groups, plan.layout.dim, plan.columns


def _conversion(plan: Plan, device: torch.device) -> Conversion:
    return tile_conversion(plan.key_dim, plan.p, plan.tile, plan.d, device)


def _lengths(cu_seqlens: Tensor) -> list[int]:
    return [stop - start for start, stop in pairwise(cu_seqlens.tolist())]


def _by_group(x: Tensor, plan: Plan) -> Tensor:
    return x.view(-1, plan.groups, *x.shape[1:])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    plan: Plan,
    keep: bool,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out [B, T, H, V], final state [N, G, D, W], sums of weights [B, T, H], states to restart from, nothing."""
    convert = _conversion(plan, q.device)
    first = None if state is None else convert.to_rows(state.flatten(0, 1))
    nothing = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    if cu_seqlens is None:
        out, norm, last, kept = chunked.forward(q, k, v, log_g, first, plan, keep, want_state)
    else:
        lengths = _lengths(cu_seqlens)
        count, done = len(lengths), []
        for index, length in enumerate(lengths):
            at = slice(sum(lengths[:index]), sum(lengths[: index + 1]))
            start = None if first is None else first[index * plan.groups : (index + 1) * plan.groups]
            gates = None if log_g is None else log_g[:, at]
            own = replace(plan, tokens=length)
            done.append(chunked.forward(q[:, at], k[:, at], v[:, at], gates, start, own, keep, want_state))
        out, norm = torch.cat([part[0] for part in done], 1), torch.cat([part[1] for part in done], 1)
        last = torch.cat([part[2] for part in done if part[2] is not None]) if want_state else None
        kept = nothing
        if keep:
            kept = nothing.new_zeros(restarts(plan, count, True, state is not None))
            used = torch.cat([part[3] for part in done])
            kept[: len(used)] = used
    final = nothing if last is None else _by_group(convert.from_rows(last), plan)
    return out, final, norm, kept if keep else nothing.clone(), nothing.clone()


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    norm: Tensor,
    kept: Tensor,
    final: Tensor | None,
    plan: Plan,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, log_g (None without gates) and of the initial state, [N, G, D, W]."""
    convert = _conversion(plan, q.device)
    last = None if grad_state is None else convert.from_rows_adjoint(grad_state.flatten(0, 1))
    reach = None if grad_state is None or final is None else (grad_state * final).sum((2, 3))
    if cu_seqlens is None:
        saved = (out, norm, kept, reach, plan, with_state)
        dq, dk, dv, grad_g, first = chunked.backward(grad_out, last, q, k, v, log_g, *saved)
        return dq, dk, dv, grad_g, _by_group(convert.to_rows_adjoint(first), plan) if with_state else None
    lengths = _lengths(cu_seqlens)
    each, used = [], 0
    for index, length in enumerate(lengths):
        own = replace(plan, tokens=length)
        pieces = restarts(own, 1, False, with_state)[0]
        at = slice(sum(lengths[:index]), sum(lengths[: index + 1]))
        own_last = None if last is None else last[index * plan.groups : (index + 1) * plan.groups]
        own_reach = None if reach is None else reach[index : index + 1]
        gates = None if log_g is None else log_g[:, at]
        saved = (out[:, at], norm[:, at], kept[used : used + pieces], own_reach, own, with_state)
        each.append(chunked.backward(grad_out[:, at], own_last, q[:, at], k[:, at], v[:, at], gates, *saved))
        used += pieces
    dq, dk = torch.cat([part[0] for part in each], 1), torch.cat([part[1] for part in each], 1)
    dv = torch.cat([part[2] for part in each], 1)
    grad_g = None if log_g is None else torch.cat([part[3] for part in each if part[3] is not None], 1)
    grad = _by_group(convert.to_rows_adjoint(torch.cat([part[4] for part in each])), plan) if with_state else None
    return dq, dk, dv, grad_g, grad
