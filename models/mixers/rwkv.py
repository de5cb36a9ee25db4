"""RWKV-7's time mix (Peng et al. 2025, arXiv 2503.14456, section 4): a state with decays and a correction of rank one.

The state S [K, V] of a head becomes diag(exp(log_g)) S + b (a . S) + k v^T, where a meets the state before its decay.
The output is S^T q.

Shapes: B batch, T tokens, m hidden size, H heads, K key head dim, V value head dim, n chunks of C tokens. The
recurrence is computed in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.kernels.distributed.recurrence import Recurrence, recur
from powerplan.mixers import RWKV7
from powerplan.models.mixers.base import SequenceMixer
from powerplan.models.mixers.delta import low_rank_projection
from powerplan.models.mixers.fla import fla_supports, rank_one_by_fla
from powerplan.models.mixers.recurrence import DecayedProducts, beside_identity, full_and_rest, no_autocast
from powerplan.models.shift import shifted, shifted_over_ranks

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel

STRONGEST_LOG_G = -0.6065306597126334
"""-exp(-0.5): log decays lie between this and 0 (arXiv 2503.14456, section 4.1)."""

ROWS_PER_BLOCK = 64
"""Tokens that share an anchor: exponents reach 32 times 0.61, far from what leaves float32."""


def rank_one_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_g: Tensor, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence of RWKV-7 in chunks, in WY form.

    Half precision on CUDA goes through flash-linear-attention where that is installed.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        a: [B, T, H, K].
        b: [B, T, H, K].
        log_g: Natural logarithms of the decays [B, T, H, K], from STRONGEST_LOG_G to 0.
        state: State [B, H, K, V] after the tokens before these; None if there are none.
        chunk_size: Tokens per chunk.

    Returns:
        Outputs [B, T, H, V] in the dtype of v, and the state [B, H, K, V] after the last token.
    """
    if fla_supports(q, v):
        return rank_one_by_fla(q, k, v, a, b, log_g, state, STRONGEST_LOG_G)
    out, state = _run_in_chunks(q, (k, v, a, b, log_g), state, chunk_size)
    assert out is not None, "there are queries"
    return out, state


def rank_one_state(
    k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_g: Tensor, chunk_size: int, *, with_transition: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the state that tokens leave behind in the recurrence of RWKV-7, without queries.

    The state after tokens that follow others is their own state plus their transition times the state before. The
    transition is computed as K more columns of the state, as that of delta rules.

    Args:
        k, v, a, b, log_g, chunk_size: As `rank_one_rule` takes them.
        with_transition: Whether the transition is wanted.

    Returns:
        The state [B, H, K, V], and the transition [B, H, K, K], or None.
    """
    columns, state = v.shape[-1], None
    if with_transition:
        v, state = beside_identity(k, v)
    if fla_supports(k, v):
        _, state = rank_one_by_fla(k, k, v, a, b, log_g, state, STRONGEST_LOG_G)
    else:
        _, state = _run_in_chunks(None, (k, v, a, b, log_g), state, chunk_size)
    return state[..., :columns], state[..., columns:] if with_transition else None


def _run_in_chunks(
    q: Tensor | None, tensors: tuple[Tensor, ...], state: Tensor | None, chunk_size: int
) -> tuple[Tensor | None, Tensor]:
    """Return the outputs [B, T, H, V], None without queries, and the last state; tensors: k, v, a, b and log_g."""
    k, v, *_ = tensors
    dtype, length = torch.promote_types(k.dtype, torch.float32), k.shape[1]
    inputs = [None if x is None else x.transpose(1, 2).to(dtype) for x in (q, *tensors)]
    outs: list[Tensor] = []
    with no_autocast(k):
        for start, stop, size in full_and_rest(length, min(chunk_size, length)):
            chunks: Any = [None if x is None else torch.unflatten(x[:, :, start:stop], 2, (-1, size)) for x in inputs]
            out, state = _chunks(*chunks, state=state)
            outs += [] if out is None else [out.flatten(2, 3)]
    assert state is not None
    return torch.cat(outs, 2).transpose(1, 2).to(v.dtype) if outs else None, state


def _chunks(
    q: Tensor | None, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_g: Tensor, *, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Return the outputs [B, H, n, C, V] of n chunks, None without queries, and the last state.

    Token i reads r_i = a_i . S. With A_ij = a_i . b_j and D_ij = a_i . k_j for j < i, decayed from j to before i, and S
    the state before the chunk, r = (I - A)^-1 (D v + a S).
    """
    cumsum = log_g.cumsum(-2)
    total = cumsum[..., -1:, :]
    readers = a * (-log_g).exp()  # The products below decay them by log_g once too often.
    by_k, by_b = (DecayedProducts(x, cumsum, ROWS_PER_BLOCK) for x in (k, b))
    lower = -by_b.with_keys(readers).tril(-1)
    eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    read_within = inverse @ (by_k.with_keys(readers).tril(-1) @ v)
    readers = inverse @ (readers * cumsum.exp())
    to_end = (total - cumsum).exp()
    b_to_end, chunk_decay = (b * to_end).mT, total.exp().mT
    updates = (k * to_end).mT @ v
    reads, states = [], []
    for index in range(k.shape[2]):
        read = read_within[:, :, index]
        if state is not None:
            states.append(state)
            read = read + readers[:, :, index] @ state
        reads.append(read)
        update = updates[:, :, index] + b_to_end[:, :, index] @ read
        state = update if state is None else chunk_decay[:, :, index] * state + update
    assert state is not None
    if q is None:
        return None, state
    out = by_k.with_keys(q).tril() @ v + by_b.with_keys(q).tril() @ torch.stack(reads, 2)
    if states:
        first = k.shape[2] - len(states)  # 1 where no state came before the first chunk, else 0
        from_states = (q * cumsum.exp())[:, :, first:] @ torch.stack(states, 2)
        out = torch.cat((out[:, :, :first], out[:, :, first:] + from_states), 2)
    return out, state


def rank_one_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Process one more token.

    Args:
        q: [B, H, K].
        k: [B, H, K].
        v: [B, H, V].
        a: [B, H, K].
        b: [B, H, K].
        log_g: Natural logarithms of the decays [B, H, K].
        state: State [B, H, K, V] after the tokens before this one.

    Returns:
        The output [B, H, V] in the dtype of v, and the state after this token.
    """
    dtype, out_dtype = state.dtype, v.dtype
    q, k, v, a, b = (x.to(dtype).unsqueeze(-2) for x in (q, k, v, a, b))
    decay = log_g.to(dtype).exp()[..., None]
    with no_autocast(state):
        state = decay * state + b.mT @ (a @ state) + k.mT @ v
        return (q @ state).squeeze(-2).to(out_dtype), state


class RankOneTensors(NamedTuple):
    """What the recurrence takes, [B, T, H, K] each, v [B, T, H, V], as `rank_one_rule` has them."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    log_g: Tensor


class RWKV7State(NamedTuple):
    """The state of the heads [B, H, K, V], and the last input [B, 1, m], which the token shift reads."""

    heads: Tensor
    last_input: Tensor


class RWKV7Mixer(SequenceMixer):
    """[B, T, m] -> [B, T, m]: RWKV-7's time mix.

    Layers with a value rank mix the values of the model's first layer into their own. Without them, as in a layer
    alone, their own stand for them.
    """

    def __init__(self, mixer: RWKV7, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.heads, self.head_dim, self.chunk_size = mixer.heads, mixer.head_dim, mixer.chunk_size
        keys, values = mixer.heads * mixer.head_dim, mixer.heads * mixer.v_head_dim
        self.shift = nn.Parameter(torch.empty(6, hidden_size, **factory_kwargs))
        self.q_proj = nn.Linear(hidden_size, keys, bias=False, **factory_kwargs)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False, **factory_kwargs)
        self.v_proj = nn.Linear(hidden_size, values, bias=False, **factory_kwargs)
        self.o_proj = nn.Linear(values, hidden_size, bias=False, **factory_kwargs)
        self.decay = low_rank_projection(
            hidden_size, mixer.decay_rank, keys, bias=True, activation=nn.Tanh(), **factory_kwargs
        )
        self.rate = low_rank_projection(hidden_size, mixer.rate_rank, keys, bias=True, **factory_kwargs)
        self.output_gate = low_rank_projection(
            hidden_size, mixer.gate_rank, values, bias=False, activation=nn.Sigmoid(), **factory_kwargs
        )
        self.value_gate = None
        if mixer.value_rank:
            self.value_gate = low_rank_projection(hidden_size, mixer.value_rank, values, bias=True, **factory_kwargs)
        self.removal, self.kept_key, self.bonus = (
            nn.Parameter(torch.empty(mixer.heads, mixer.head_dim, **factory_kwargs)) for _ in range(3)
        )
        self.output_norm = nn.GroupNorm(mixer.heads, values, eps=mixer.head_dim * 1e-5, **factory_kwargs)
        self.init_weights(1.0)

    def run(
        self,
        x: Tensor,
        past_tokens: int,
        state: Any,
        *,
        return_state: bool,
        first_values: Tensor | None = None,
        return_values: bool = False,
    ) -> tuple[Any, Any]:
        """Return the output and the state as all mixers do. With `return_values`, the output and the first values.

        first_values: the values [B, T, H V] of the model's first layer; None where this is that layer.
        """
        heads_state, last_input = (None, None) if state is None else state
        tensors, first_values, for_gate = self.prepare(x, shifted(x, last_input), first_values)
        if heads_state is not None and x.shape[1] == 1:
            token = {name: part[:, 0] for name, part in tensors._asdict().items()}
            out, heads_state = rank_one_step(**token, state=heads_state)
            out = out[:, None]
        else:
            out, heads_state = rank_one_rule(*tensors, heads_state, self.chunk_size)
        out = self.merge(out, tensors, for_gate)
        kept = RWKV7State(heads_state, x[:, -1:].clone()) if return_state else None
        return ((out, first_values) if return_values else out), kept

    def run_shared(
        self,
        x: Tensor,
        cp: ContextParallel,
        *,
        return_state: bool,
        first_values: Tensor | None = None,
        return_values: bool = False,
    ) -> tuple[Any, Any]:
        """Return the same of this rank's tokens of sequences that lie on several ranks; first_values are of these."""
        x, before, last_input = shifted_over_ranks(x, cp, return_state=return_state)
        tensors, first_values, for_gate = self.prepare(x, before, first_values)

        def state_of(own: Any, _: int, wanted: bool) -> tuple[Tensor, Tensor | None]:
            given = {name: x for name, x in own.items() if name != "q"}
            return rank_one_state(**given, chunk_size=self.chunk_size, with_transition=wanted)

        def run(own: Any, _: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return rank_one_rule(**own, state=state, chunk_size=self.chunk_size)

        state_size = (self.heads, self.head_dim, tensors.v.shape[-1])
        recurrence = Recurrence(type(self).__name__, state_size, (self.head_dim, self.head_dim), state_of, run)
        out, final = recur(cp, recurrence, tensors._asdict(), return_state=return_state)
        out = self.merge(out, tensors, for_gate)
        kept = None if final is None or last_input is None else RWKV7State(final, last_input)
        return ((out, first_values) if return_values else out), kept

    def prepare(self, x: Tensor, before: Tensor, first_values: Tensor | None) -> tuple[RankOneTensors, Tensor, Tensor]:
        """Return what the recurrence takes, the values of the first layer, and the input of the output gate.

        before: the token before each token of x [B, T, m].
        """
        delta = before - x
        for_q, for_decay, for_k, for_v, for_rate, for_gate = (x + delta * share for share in self.shift)
        q, k = (
            project(part).unflatten(-1, (self.heads, self.head_dim))
            for project, part in ((self.q_proj, for_q), (self.k_proj, for_k))
        )
        v = self.v_proj(for_v)
        first_values = v if first_values is None else first_values
        if self.value_gate is not None:
            v = v + (first_values - v) * self.value_gate(for_v).sigmoid()
        v = v.unflatten(-1, (self.heads, -1))
        gate = self.decay(for_decay).to(torch.promote_types(x.dtype, torch.float32))
        log_g = (STRONGEST_LOG_G * gate.sigmoid()).unflatten(-1, (self.heads, self.head_dim))
        rate = self.rate(for_rate).sigmoid().unflatten(-1, (self.heads, self.head_dim))
        removed = F.normalize(k * self.removal, dim=-1)
        k = k * (1 + (rate - 1) * self.kept_key)
        return RankOneTensors(q, k, v, -removed, removed * rate, log_g), first_values, for_gate

    def merge(self, out: Tensor, tensors: RankOneTensors, for_gate: Tensor) -> Tensor:
        """Return the heads' outputs [B, T, H, V] normalised, with the bonus, gated and back in the hidden size."""
        q, k, v, *_ = tensors
        normed = self.output_norm(out.flatten(0, 1).flatten(1)).unflatten(0, out.shape[:2]).to(v.dtype)
        out = normed + ((q * k * self.bonus).sum(-1, keepdim=True) * v).flatten(-2)
        result: Tensor = self.o_proj(out.to(v.dtype) * self.output_gate(for_gate))
        return result

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Draw shifts uniform in [0, 1] and decays' biases uniform in [-5.5, 0.5]; set other biases and key weights.

        The numbers are the middle of those that flash-linear-attention sets by layer and channel (layers/rwkv7.py).
        """
        self.shift.uniform_(0, 1)
        _last_bias(self.decay).uniform_(-5.5, 0.5)
        _last_bias(self.rate).fill_(-0.19)
        if self.value_gate is not None:
            _last_bias(self.value_gate).fill_(0.73)
        self.removal.fill_(0.71)
        self.kept_key.fill_(1.02)
        self.bonus.fill_(-0.04)


def _last_bias(projection: nn.Sequential) -> Tensor:
    bias = projection[-1].bias
    assert isinstance(bias, Tensor)
    return bias
