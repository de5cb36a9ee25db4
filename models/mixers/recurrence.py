"""Matrix states that decay and are corrected, in chunks and token by token: gated linear attention and delta rules.

The state S [K, V] of a head is first multiplied by exp(log_g), one factor per token or one per key channel. Then it
takes in the token. In gated linear attention (Yang et al. 2023, arXiv 2312.06635, section 4) it does so by
S += k v^T. In the delta rule (Yang et al. 2024, arXiv 2406.06484, section 3, and arXiv 2412.06464, section 3; per
channel: Kimi Linear, arXiv 2510.26692, section 3) it does so by S += beta k (v - S^T k)^T. The output is S^T q.

Shapes: B batch, T tokens, H heads, K key head dim, V value head dim, N chunks of C tokens. Everything is computed in
float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from powerplan.models.mixers.fla import delta_rule_by_fla, fla_supports, gated_linear_by_fla

MIN_LOG_G = {torch.float32: -20.0, torch.float64: -80.0}
"""Log decays below these count as these. exp(-20) = 2e-9 and exp(-80) = 2e-35 are far below the dtype's precision, and
the exponents of half a row block (ROWS_PER_BLOCK) stay in the dtype's range."""

ROWS_PER_BLOCK = 8
"""Tokens that share an anchor where each key channel has a decay of its own. Exponents reach 4 times MIN_LOG_G."""


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute gated linear attention in chunks.

    Half precision on CUDA goes through flash-linear-attention where that is installed.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_g: Natural logarithms of the decays [B, T, H, K], at most 0.
        state: State [B, H, K, V] after the tokens before these; None if there are none.
        chunk_size: Tokens per chunk.

    Returns:
        Outputs [B, T, H, V] in the dtype of v, and the state [B, H, K, V] after the last token.
    """
    if fla_supports(q, v):
        return gated_linear_by_fla(q, k, v, log_g.clamp(min=MIN_LOG_G[torch.float32]), state)
    out, state = _run_in_chunks((q, k, v, log_g), None, state, chunk_size)
    assert out is not None, "there are queries"
    return out, state


def gated_linear_state(k: Tensor, v: Tensor, log_g: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return the state that tokens leave behind in gated linear attention, without queries.

    The state after tokens that follow others is their own state plus their transition times the state before.

    Args:
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_g: Natural logarithms of the decays [B, T, H, K], at most 0.
        chunk_size: Tokens per chunk.

    Returns:
        The state [B, H, K, V], and the transition [B, H, K, 1]: the product of the decays.
    """
    _, state = _run_in_chunks((None, k, v, log_g), None, None, chunk_size)
    lowest = MIN_LOG_G[state.dtype]
    return state, log_g.clamp(min=lowest).double().sum(1).exp().to(state.dtype)[..., None]


def delta_rule_state(
    k: Tensor, v: Tensor, beta: Tensor, log_g: Tensor | None, chunk_size: int, *, with_transition: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the state that tokens leave behind under the delta rule, without queries.

    The state after tokens that follow others is their own state plus their transition times the state before. The rule
    is linear in the values and the state before them: so the transition is the state that values of 0 leave of an
    identity matrix. It is computed as K more columns of the state.

    Args:
        k: [B, T, H, K], of norm 1.
        v: [B, T, H, V].
        beta: Learning rates [B, T, H].
        log_g: Natural logarithms of the decays, [B, T, H] or [B, T, H, K], or None, as in `delta_rule`.
        chunk_size: Tokens per chunk.
        with_transition: Whether the transition is wanted.

    Returns:
        The state [B, H, K, V], and the transition [B, H, K, K], or None.
    """
    columns, state = v.shape[-1], None
    if with_transition:
        v, state = beside_identity(k, v)
    if fla_supports(k, v):
        _, state = delta_rule_by_fla(k, k, v, beta, log_g, state)
    else:
        _, state = _run_in_chunks((None, k, v, _channels(log_g, beta)), beta, state, chunk_size)
    return state[..., :columns], state[..., columns:] if with_transition else None


def beside_identity(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a rule that is linear in values and state needs to compute its transition as K more columns.

    k: [B, T, H, K]. v: [B, T, H, V].

    Returns:
        The values [B, T, H, V + K], 0 in the new columns; and the state [B, H, K, V + K] before them, which is the
        identity there and 0 elsewhere.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    eye = torch.eye(k.shape[-1], dtype=dtype, device=k.device).expand(k.shape[0], k.shape[2], -1, -1)
    before = torch.cat((eye.new_zeros(*eye.shape[:3], v.shape[-1]), eye), -1)
    return F.pad(v, (0, k.shape[-1])), before


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_g: Tensor | None, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute the delta rule in chunks.

    Half precision on CUDA goes through flash-linear-attention where that is installed.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K], of norm 1.
        v: [B, T, H, V].
        beta: Learning rates [B, T, H].
        log_g: Natural logarithms of the decays, at most 0: [B, T, H], or [B, T, H, K] with one per key channel. None
            stands for no decay.
        state: State [B, H, K, V] after the tokens before these; None if there are none.
        chunk_size: Tokens per chunk.

    Returns:
        Outputs [B, T, H, V] in the dtype of v, and the state [B, H, K, V] after the last token.
    """
    if fla_supports(q, v):
        return delta_rule_by_fla(q, k, v, beta, log_g, state)
    out, state = _run_in_chunks((q, k, v, _channels(log_g, beta)), beta, state, chunk_size)
    assert out is not None, "there are queries"
    return out, state


def recurrent_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_g: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Process one more token.

    Args:
        q: [B, H, K].
        k: [B, H, K].
        v: [B, H, V].
        beta: Learning rates [B, H] of the delta rule. None stands for gated linear attention.
        log_g: Natural logarithms of the decays [B, H] or [B, H, K]. None stands for no decay.
        state: State [B, H, K, V] after the tokens before this one.

    Returns:
        The output [B, H, V] in the dtype of v, and the state after this token.
    """
    dtype, out_dtype = state.dtype, v.dtype
    q, k, v = (x.to(dtype).unsqueeze(-2) for x in (q, k, v))
    with no_autocast(state):
        if log_g is not None:
            decay = log_g.to(dtype).clamp(min=MIN_LOG_G[dtype]).exp()
            state = state * (decay if decay.ndim == 3 else decay[..., None])[..., None]
        if beta is not None:
            v = beta.to(dtype)[..., None, None] * (v - k @ state)
        state = state + k.mT @ v
        return (q @ state).squeeze(-2).to(out_dtype), state


def _channels(log_g: Tensor | None, beta: Tensor) -> Tensor:
    """Return log decays as [B, T, H, K or 1]: 0 where there are none."""
    if log_g is None:
        log_g = torch.zeros_like(beta)
    return log_g if log_g.ndim == 4 else log_g[..., None]


def _run_in_chunks(
    tensors: tuple[Tensor | None, Tensor, Tensor, Tensor], beta: Tensor | None, state: Tensor | None, chunk_size: int
) -> tuple[Tensor | None, Tensor]:
    """Run all full chunks at once, and the remaining tokens as one shorter chunk: nothing is padded.

    tensors: q, k, v and log_g. Where q is None there are no outputs.
    """
    _, k, v, _ = tensors
    dtype, length = torch.promote_types(k.dtype, torch.float32), k.shape[1]
    given = (*tensors, None if beta is None else beta[..., None])
    inputs = [None if x is None else x.transpose(1, 2).to(dtype) for x in given]
    outs: list[Tensor] = []
    with no_autocast(k):
        for start, stop, size in full_and_rest(length, min(chunk_size, length)):
            chunks: Any = [None if x is None else torch.unflatten(x[:, :, start:stop], 2, (-1, size)) for x in inputs]
            out, state = _chunks(*chunks, state=state)
            outs += [] if out is None else [out.flatten(2, 3)]
    assert state is not None
    return torch.cat(outs, 2).transpose(1, 2).to(v.dtype) if outs else None, state


def _chunks(
    q: Tensor | None, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor | None, *, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Return the outputs [B, H, N, C, V] and the last state; log_g [B, H, N, C, K or 1], beta [B, H, N, C, 1].

    The delta rule runs in WY form (arXiv 2406.06484, section 3.2). With A_ij = beta_i (k_i . k_j) decayed from j to i,
    j < i, and S the state before the chunk, the tokens add the values (I + A)^-1 beta (v - k S) = u - w S to the state.
    """
    cumsum = log_g.clamp(min=MIN_LOG_G[log_g.dtype]).cumsum(-2)
    total = cumsum[..., -1:, :]
    chunk_decay, k_to_end = total.exp().mT, (k * (total - cumsum).exp()).mT
    products = None if q is None and beta is None else DecayedProducts(k, cumsum)
    u, w = v, None
    if beta is not None:
        assert products is not None
        lower = (beta * products.with_keys(k)).tril(-1)
        eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        u, w = inverse @ (beta * v), inverse @ (beta * cumsum.exp() * k)
    # Chunks follow each other, because each needs the state before it. Outputs are computed for all of them at the end.
    new_values, states = [], []
    for index in range(k.shape[2]):
        values = u[:, :, index]
        if state is not None:
            states.append(state)
            values = values if w is None else values - w[:, :, index] @ state
        new_values.append(values)
        update = k_to_end[:, :, index] @ values
        state = update if state is None else chunk_decay[:, :, index] * state + update
    assert state is not None
    if q is None:
        return None, state
    assert products is not None
    out = products.with_keys(q).tril() @ torch.stack(new_values, 2)
    if states:
        first = k.shape[2] - len(states)  # 1 where no state came before the first chunk, else 0
        from_states = (q * cumsum.exp())[:, :, first:] @ torch.stack(states, 2)
        out = torch.cat((out[:, :, :first], out[:, :, first:] + from_states), 2)
    return out, state


class DecayedProducts:
    """Products x_i . k_j decayed by exp(cumsum_i - cumsum_j). Only those with j <= i are meaningful.

    rows_per_block: how many rows share an anchor where each key channel has a decay of its own.
    """

    def __init__(self, k: Tensor, cumsum: Tensor, rows_per_block: int = ROWS_PER_BLOCK) -> None:
        self.k, self.cumsum = k, cumsum
        if cumsum.shape[-1] == 1:
            self.decay = (cumsum - cumsum.mT).masked_fill(above_diagonal(k), 0).exp()
            return
        # With a decay per channel, exp(cumsum_i) and exp(-cumsum_j) are multiplied to x and k separately. Alone they
        # would leave float32. So both are taken relative to an anchor in the middle of each block of rows. Keys before
        # the block get smaller. Those in it after the anchor grow within range. Those after the block are masked later,
        # and are clamped so that they do not become NaN.
        highest = -ROWS_PER_BLOCK // 2 * MIN_LOG_G[cumsum.dtype]
        self.blocks = []
        for start, stop, rows in full_and_rest(k.shape[-2], rows_per_block):
            block = torch.unflatten(cumsum[..., start:stop, :], -2, (-1, rows))
            anchor = block[..., rows // 2 : rows // 2 + 1, :]
            keys = k.unsqueeze(-3) * (anchor - cumsum.unsqueeze(-3)).clamp(max=highest).exp()
            self.blocks.append((start, stop, (block - anchor).exp(), keys))

    def with_keys(self, x: Tensor) -> Tensor:
        """Return the products [..., C, C] of x [..., C, K] with all keys."""
        if self.cumsum.shape[-1] == 1:
            return (x @ self.k.mT) * self.decay
        products = []
        for start, stop, decay, keys in self.blocks:
            rows = torch.unflatten(x[..., start:stop, :], -2, (-1, decay.shape[-2])) * decay
            products.append((rows @ keys.mT).flatten(-3, -2))
        # Masked products may be infinite, and infinity times 0 is NaN: they are filled, not multiplied.
        return torch.cat(products, -2).masked_fill(above_diagonal(x), 0)

    def sum_keys(self, weights: Tensor) -> Tensor:
        """Return the sums [..., C, K] of keys j decayed to row i, by weights [..., C, C] that are 0 above the diagonal.

        For decays of each key channel only.
        """
        sums = []
        for start, stop, decay, keys in self.blocks:
            rows = torch.unflatten(weights[..., start:stop, :], -2, (-1, decay.shape[-2]))
            sums.append(((rows @ keys) * decay).flatten(-3, -2))
        return torch.cat(sums, -2)


def above_diagonal(x: Tensor) -> Tensor:
    """Return the mask [C, C] that is true above the diagonal, for x [..., C, K]."""
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)


def full_and_rest(length: int, size: int) -> list[tuple[int, int, int]]:
    """Return start, stop and piece size, for the tokens in full pieces of `size` and for those that are left over."""
    full = length // size * size
    return [span for span in ((0, full, size), (full, length, length - full)) if span[0] < span[1]]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch off autocast, which would round products to bf16. The meta device has none."""
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else nullcontext()
