"""Matrix states that decay and are corrected, in chunks and token by token: gated linear attention and delta rules.

The state S [K, V] of a head decays by exp(log_g), one factor per token or one per key channel, and then takes in the
token: S += k v^T (gated linear attention, Yang et al. 2023, arXiv 2312.06635, section 4), or S += beta k (v - S^T k)^T
(delta rule: Yang et al. 2024, arXiv 2406.06484, section 3, and arXiv 2412.06464, section 3; per channel: Kimi Linear,
arXiv 2510.26692, section 3). The output is S^T q.

Shapes: B batch, T time, H heads, K key head dim, V value head dim; within, N chunks of C tokens. All is computed in
float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

LOWEST = {torch.float32: -20.0, torch.float64: -80.0}
"""Log decays below these count as these: exp(-20) = 2e-9 and exp(-80) = 2e-35 are far below the dtype's precision, and
half a row block of them (ROWS) stays in its range."""

HAS_FLA = find_spec("fla") is not None
"""Whether flash-linear-attention is installed, found once: torch.compile could not trace the search before 2.7."""

ROWS = 8
"""Rows that share an anchor where each key channel has a decay of its own: exponents reach 4 times LOWEST."""


def gated_linear(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Return the outputs [B, T, H, V] in v's dtype, and the state [B, H, K, V] after the last token.

    q, k: [B, T, H, K]; v: [B, T, H, V]; log_g: [B, T, H, K], at most 0; state: what came before, None for nothing.
    """
    return _in_pieces((q, k, v, log_g), None, state, chunk_size)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_g: Tensor | None, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Return the outputs [B, T, H, V] in v's dtype, and the state [B, H, K, V] after the last token.

    q, k: [B, T, H, K], keys of norm 1; v: [B, T, H, V]; beta: [B, T, H]; log_g: [B, T, H], [B, T, H, K], or None for no
    decay; state: what came before, None for nothing. Half precision on CUDA goes through flash-linear-attention where
    that is installed.
    """
    if _fla_takes(q, v):
        return _by_fla(q, k, v, beta, log_g, state)
    if log_g is None:
        log_g = torch.zeros_like(beta)
    return _in_pieces((q, k, v, log_g if log_g.ndim == 4 else log_g[..., None]), beta, state, chunk_size)


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_g: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, V] of one more token, and the state after it; without beta, nothing is corrected.

    q, k: [B, H, K]; v: [B, H, V]; beta: [B, H]; log_g: [B, H] or [B, H, K].
    """
    dtype, out_dtype = state.dtype, v.dtype
    q, k, v = (x.to(dtype).unsqueeze(-2) for x in (q, k, v))
    with _full_precision(state):
        if log_g is not None:
            factor = log_g.to(dtype).clamp(min=LOWEST[dtype]).exp()
            state = state * (factor if factor.ndim == 3 else factor[..., None])[..., None]
        if beta is not None:
            v = beta.to(dtype)[..., None, None] * (v - k @ state)
        state = state + k.mT @ v
        return (q @ state).squeeze(-2).to(out_dtype), state


def _in_pieces(
    tokens: tuple[Tensor, ...], beta: Tensor | None, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Run whole chunks at once and the rest as a chunk of its own: nothing is padded."""
    dtype = torch.promote_types(tokens[0].dtype, torch.float32)
    whole = [x.transpose(1, 2).to(dtype) for x in (*tokens, *(() if beta is None else (beta[..., None],)))]
    length = whole[0].shape[2]
    size = min(chunk_size, length)
    outs = []
    with _full_precision(whole[0]):
        for start, stop, width in _spans(length, size):
            pieces = [x[:, :, start:stop].unflatten(2, (-1, width)) for x in whole]
            out, state = _chunks(*pieces, state=state)
            outs.append(out.flatten(2, 3))
    assert state is not None
    return torch.cat(outs, 2).transpose(1, 2).to(tokens[2].dtype), state


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor | None = None, *, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the outputs [B, H, N, C, V] and the last state; log_g [B, H, N, C, K or 1], beta [B, H, N, C, 1].

    The delta rule in WY form: with A_ij = beta_i (k_i . k_j) decayed from j to i, j < i, what the tokens write is
    (I + A)^-1 beta (v - k S), S the state before the chunk.
    """
    grown = log_g.clamp(min=LOWEST[log_g.dtype]).cumsum(-2)
    pairs = _Pairs(k, grown)
    asked, late = q * grown.exp(), grown[..., -1:, :]
    kept, writers = late.exp().mT, (k * (late - grown).exp()).mT
    scores = pairs.of(q).tril()
    found = None
    if beta is not None:
        lower = (beta * pairs.of(k)).tril(-1)
        eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        v, found = inverse @ (beta * v), inverse @ (beta * grown.exp() * k)
    written, states = [], []
    for index in range(k.shape[2]):
        own = v[:, :, index]
        if state is not None:
            states.append(state)
            own = own if found is None else own - found[:, :, index] @ state
        written.append(own)
        update = writers[:, :, index] @ own
        state = update if state is None else kept[:, :, index] * state + update
    assert state is not None
    out = scores @ torch.stack(written, 2)
    if states:
        first = k.shape[2] - len(states)
        answers = asked[:, :, first:] @ torch.stack(states, 2)
        out = torch.cat((out[:, :, :first], out[:, :, first:] + answers), 2)
    return out, state


class _Pairs:
    """Products x_i . k_j decayed by exp(grown_i - grown_j), right for j <= i; above the diagonal they mean nothing."""

    def __init__(self, k: Tensor, grown: Tensor) -> None:
        self.k, self.grown = k, grown
        if grown.shape[-1] == 1:
            later = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).triu(1)
            self.span = (grown - grown.mT).masked_fill(later, 0).exp()
            return
        # Both sides are written relative to an anchor amid each block of rows. Keys before it shrink; those after it in
        # the block grow within range; those after the block are masked in the end, and only must not become NaN.
        highest = -ROWS // 2 * LOWEST[grown.dtype]
        self.blocks = []
        for start, stop, rows in _spans(k.shape[-2], ROWS):
            own = torch.unflatten(grown[..., start:stop, :], -2, (-1, rows))
            anchor = own[..., rows // 2 : rows // 2 + 1, :]
            keys = k.unsqueeze(-3) * (anchor - grown.unsqueeze(-3)).clamp(max=highest).exp()
            self.blocks.append((start, stop, (own - anchor).exp(), keys))

    def of(self, x: Tensor) -> Tensor:
        """Return the products [..., C, C] of x [..., C, K] with all keys."""
        if self.grown.shape[-1] == 1:
            return (x @ self.k.mT) * self.span
        later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        found = []
        for start, stop, decay, keys in self.blocks:
            rows = torch.unflatten(x[..., start:stop, :], -2, (-1, decay.shape[-2])) * decay
            found.append((rows @ keys.mT).flatten(-3, -2))
        # Products of what is masked may be infinite: they are filled, as times 0 they would be NaN.
        return torch.cat(found, -2).masked_fill(later, 0)


def _spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """Return start, stop and piece size of the whole pieces of `size`, and of what is left over."""
    last = length // size * size
    return [span for span in ((0, last, size), (last, length, length - last)) if span[0] < span[1]]


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast, which would turn products to bf16, is off; a meta device has none."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()


def _fla_takes(q: Tensor, v: Tensor) -> bool:
    """Return whether flash-linear-attention's kernels run these: CUDA, half precision, key head dims up to 256."""
    half = q.dtype in (torch.bfloat16, torch.float16) and v.dtype == q.dtype
    return q.is_cuda and half and q.shape[-1] <= 256 and HAS_FLA


def _by_fla(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_g: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The delta rules by flash-linear-attention's chunk kernels: chosen for CUDA tensors alone (`_fla_takes`).

    Their chunks are always 64 tokens; q comes scaled. Arguments as in its fla/ops/{delta_rule,gated_delta_rule,kda}.
    """
    settings: dict[str, Any] = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    if log_g is None:
        from fla.ops.delta_rule import chunk_delta_rule

        out, state = chunk_delta_rule(q=q, k=k, v=v, beta=beta.to(q.dtype), **settings)
    elif log_g.ndim == 3:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        out, state = chunk_gated_delta_rule(q=q, k=k, v=v, g=log_g, beta=beta.to(q.dtype), **settings)
    else:
        from fla.ops.kda import chunk_kda

        out, state = chunk_kda(q=q, k=k, v=v, g=log_g, beta=beta.to(q.dtype), **settings)
    assert state is not None
    return out, state
