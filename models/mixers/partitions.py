"""Sparse state expansion over gated linear attention (Pan et al. 2025, arXiv 2507.16577, section 3).

Every token reads and writes a shared state, and `top_k` partitions that a router chooses for it. A partition is gated
linear attention over the tokens that chose it: for all others it stays as it is.

Shapes: B batch, T tokens, m hidden size, H heads, K key head dim, V value head dim, P partitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.kernels.distributed.recurrence import Recurrence, recur
from powerplan.mixers.linear import MatrixState
from powerplan.mixers.slots import SparseStateExpansion
from powerplan.models.mixers.delta import GatedLinearAttention, low_rank_projection
from powerplan.models.mixers.matrix import MatrixMixer
from powerplan.models.mixers.recurrence import gated_linear_attention, gated_linear_state, recurrent_step

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class Gated(NamedTuple):
    """What gated linear attention takes: q, k and log decays [B, T, H, K], and v [B, T, H, V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_g: Tensor


class PartitionedAttention(MatrixMixer):
    """Sparse state expansion. The paper's code is not public: choices that it leaves open are those of SSEGLA.

    SSEGLA is a public re-implementation on flash-linear-attention. Queries and values go through SiLU, keys through a
    softmax over their features. Queries and keys of the partitions are those of the shared state, plus a low-rank part
    before the activation, times the router's softmax.
    """

    silu_follows = False

    def __init__(self, mixer: SparseStateExpansion, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, **factory_kwargs)
        keys, rank = mixer.heads * mixer.head_dim, mixer.v_head_dim
        self.top_k = mixer.top_k
        self.router = nn.Linear(hidden_size, mixer.partitions, bias=False, **factory_kwargs)
        self.more_q, self.more_k = (
            low_rank_projection(hidden_size, rank, keys, bias=False, **factory_kwargs) for _ in range(2)
        )
        self.shared_decay, self.decay = (
            low_rank_projection(hidden_size, mixer.gate_rank, keys, bias=True, **factory_kwargs) for _ in range(2)
        )

    def build_gate(self, mixer: MatrixState, hidden_size: int, **factory_kwargs: Any) -> nn.Module:
        rank, values = mixer.v_head_dim, mixer.heads * mixer.v_head_dim
        return low_rank_projection(hidden_size, rank, values, bias=False, **factory_kwargs)

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, past_tokens: int, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        """Return the heads' outputs, and the states [B, 1 + P, H, K, V]: the shared one and those of partitions."""
        shared, own, shares, chosen = self.prepare(x, q, k, v)
        if state is not None and x.shape[1] == 1:
            return _step(shared, own, shares, chosen, state)
        return self.run_states(shared, own, shares, chosen, state)

    def mix_shared(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        """To the exchange, the heads of the shared state and of all partitions are (1 + P) H heads."""
        shared, own, shares, chosen = self.prepare(x, q, k, v)
        count = 1 + self.router.out_features
        tensors = shared._asdict() | {"shares": shares, "chosen": chosen}
        tensors |= {"own_q": own.q, "own_k": own.k, "own_log_g": own.log_g}

        def parts(given: Any) -> tuple[Gated, Gated, Tensor, Tensor]:
            shared = Gated(given["q"], given["k"], given["v"], given["log_g"])
            own = Gated(given["own_q"], given["own_k"], given["v"], given["own_log_g"])
            return shared, own, given["shares"], given["chosen"]

        def state_of(given: Any, _: int, __: bool) -> tuple[Tensor, Tensor]:
            state, transition = self.states_left_behind(*parts(given))
            return state.flatten(1, 2), transition.flatten(1, 2)

        def run(given: Any, _: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
            before = None if state is None else torch.unflatten(state, 1, (count, -1))
            out, after = self.run_states(*parts(given), before)
            return out, after.flatten(1, 2)

        state_size = (count * self.heads, self.head_dim, self.v_head_dim)
        recurrence = Recurrence(type(self).__name__, state_size, (self.head_dim, 1), state_of, run)
        out, final = recur(cp, recurrence, tensors, return_state=return_state)
        return out, None if final is None else torch.unflatten(final, 1, (count, -1))

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Gated, Gated, Tensor, Tensor]:
        """Return q, k, v and log decays of the shared state and of partitions, and the router's shares and choices.

        Those are [B, T, top_k] each.
        """
        shares, chosen = self.router(x).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).topk(self.top_k)
        more_q, more_k = (part(x).view_as(q) for part in (self.more_q, self.more_k))
        v = F.silu(v)
        shared = Gated(*_activated(q, k, v.dtype), v, self._log_decays(self.shared_decay, x))
        own = Gated(*_activated(q + more_q, k + more_k, v.dtype), v, self._log_decays(self.decay, x))
        return shared, own, shares, chosen

    def run_states(
        self,
        shared: Gated,
        own: Gated,
        shares: Tensor,
        chosen: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the heads' outputs [B, T, H, V], and the states [B, 1 + P, H, K, V], from those before the tokens."""
        v = shared.v
        outs, shared_state = gated_linear_attention(*shared, None if state is None else state[:, 0], self.chunk_size)
        if state is None:
            state = shared_state.new_zeros(v.shape[0], 1 + self.router.out_features, *shared_state.shape[1:])
        outs, states = outs.to(torch.promote_types(outs.dtype, torch.float32)), [shared_state]
        for partition in range(1, state.shape[1]):
            last = list(state[:, partition])
            for row, tokens, parts in _choices(own, shares, chosen == partition - 1):
                out, after = gated_linear_attention(*parts, last[row][None], self.chunk_size)
                outs = outs.index_put((torch.tensor(row, device=tokens.device), tokens), out[0].to(outs.dtype), True)
                last[row] = after[0]
            states.append(torch.stack(last))
        return outs.to(v.dtype), torch.stack(states, 1)

    def states_left_behind(self, shared: Gated, own: Gated, shares: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states [B, 1 + P, H, K, V] that tokens leave behind, without queries, and what they multiply those
        before by, [B, 1 + P, H, K, 1]: the decays of the tokens that chose a partition, 1 where none did."""
        found = [gated_linear_state(*shared[1:], self.chunk_size)]
        for partition in range(self.router.out_features):
            state, transition = (list(torch.full_like(part, fill)) for part, fill in zip(found[0], (0, 1), strict=True))
            for row, _, parts in _choices(own, shares, chosen == partition):
                (state[row],), (transition[row],) = gated_linear_state(*parts[1:], self.chunk_size)
            found.append((torch.stack(state), torch.stack(transition)))
        states, transitions = zip(*found, strict=True)
        return torch.stack(states, 1), torch.stack(transitions, 1)

    def _log_decays(self, project: nn.Module, x: Tensor) -> Tensor:
        gate = project(x).unflatten(-1, (self.heads, self.head_dim))
        return F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / GatedLinearAttention.temperature


def _choices(own: Gated, shares: Tensor, is_chosen: Tensor) -> Iterator[tuple[int, Tensor, Gated]]:
    """Yield the rows of the batch in which tokens chose a partition: the row, the tokens, and what they give to it.

    own: q, k, v and log decays of partitions, [B, T, ...]. shares: [B, T, top_k]. is_chosen: where the partition is the
    choice of a token, [B, T, top_k]. Each sequence has as many tokens as chose it. Queries and keys are multiplied by
    the router's share.
    """
    share = (shares * is_chosen).sum(-1)
    for row in range(shares.shape[0]):
        (tokens,) = is_chosen[row].any(-1).nonzero(as_tuple=True)
        if len(tokens):
            q, k, v, log_g = (part[row : row + 1, tokens] for part in own)
            weight = share[row, tokens].to(q.dtype)[:, None, None]
            yield row, tokens, Gated(q * weight, k * weight, v, log_g)


def _activated(q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return SiLU(q) K^-0.5 and the softmax of k over its features; autocast leaves a softmax in float32."""
    return (F.silu(q) * q.shape[-1] ** -0.5).to(dtype), k.softmax(-1).to(dtype)


def _step(shared: Gated, own: Gated, shares: Tensor, chosen: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Process one more token, by the shared state and the chosen ones at once: all others stay as they are."""
    weight = shares[:, 0, :, None, None].to(own[0].dtype)  # [B, top_k, 1, 1]
    index = torch.cat((torch.zeros_like(chosen[:, 0, :1]), chosen[:, 0] + 1), 1)  # [B, 1 + top_k]
    weights = (weight, weight, torch.ones_like(weight), torch.ones_like(weight))
    parts = [
        torch.cat((one, (other * by).to(one.dtype)), 1).flatten(0, 1)
        for one, other, by in zip(shared, own, weights, strict=True)
    ]
    where = index[..., None, None, None].expand(*index.shape, *state.shape[2:])
    q, k, v, log_g = parts
    out, touched = recurrent_step(q, k, v, None, log_g, state.gather(1, where).flatten(0, 1))
    out, touched = (torch.unflatten(part, 0, index.shape) for part in (out, touched))
    return out.sum(1, keepdim=True), state.scatter(1, where, touched)
