"""Delta rules (DeltaNet, gated DeltaNet, Kimi delta attention) and gated linear attention, by recurrence.py.

Shapes: B batch, T tokens, m hidden size, H heads, K key head dim, V value head dim.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.kernels.distributed.recurrence import Recurrence, recur
from powerplan.mixers import GLA, KDA
from powerplan.mixers.linear import MatrixState
from powerplan.models.mixers.matrix import MatrixMixer
from powerplan.models.mixers.recurrence import (
    delta_rule,
    delta_rule_state,
    gated_linear_attention,
    gated_linear_state,
    recurrent_step,
)

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class Decay(nn.Module):
    """Log decays -exp(a_log) softplus(project(x) + dt_bias), as in Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

    [B, T, m] -> [B, T, H] with one decay per head (gated DeltaNet), or -> [B, T, H, K] with one per key channel (KDA).
    The result is float32, or float64 for float64 inputs.

    Args:
        project: Module [B, T, m] -> [B, T, H] or [B, T, H K].
        heads: H.
        channels: K, or None for one decay per head.
        **factory_kwargs: device and dtype.
    """

    def __init__(self, project: nn.Module, heads: int, channels: int | None, **factory_kwargs: Any) -> None:
        super().__init__()
        self.project = project
        self.a_log = nn.Parameter(torch.empty(heads, **factory_kwargs))
        self.dt_bias = nn.Parameter(torch.empty((heads,) if channels is None else (heads, channels), **factory_kwargs))
        self.init_weights(1.0)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        rate = self.a_log.to(dtype).exp()
        inputs = self.project(x).to(dtype).unflatten(-1, self.dt_bias.shape) + self.dt_bias.to(dtype)
        return -(rate if inputs.ndim == 3 else rate[:, None]) * F.softplus(inputs)

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Draw exp(a_log) uniform in [1, 16] and steps log-uniform in [0.001, 0.1], as Mamba-2 and gated DeltaNet do.

        dt_bias is the inverse softplus of the steps.
        """
        self.a_log.uniform_(1, 16).log_()
        draw_steps(self.dt_bias)


@torch.no_grad()
def draw_steps(dt_bias: Tensor) -> None:
    """Fill dt_bias with the inverse softplus of steps that are log-uniform in [0.001, 0.1], as in Mamba."""
    steps = dt_bias.uniform_(math.log(0.001), math.log(0.1)).exp_()
    dt_bias.copy_(steps + (-torch.expm1(-steps)).log())


class DeltaNetMixer(MatrixMixer):
    """DeltaNet (Yang et al. 2024, arXiv 2406.06484): queries and keys of norm 1, a learning rate per head, no decay."""

    activated = True

    def __init__(self, mixer: MatrixState, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, **factory_kwargs)
        self.b_proj = nn.Linear(hidden_size, mixer.heads, bias=False, **factory_kwargs)
        self.decay = self.build_decay(mixer, hidden_size, **factory_kwargs)

    def build_decay(self, mixer: MatrixState, hidden_size: int, **factory_kwargs: Any) -> Decay | None:
        """Return the module of the log decays, or None where there is no decay."""
        return None

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, past_tokens: int, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        q, k, beta, log_g = self.prepare(x, q, k, v)
        if state is not None and x.shape[1] == 1:
            step_log_g = None if log_g is None else log_g[:, 0]
            out, state = recurrent_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], step_log_g, state)
            return out[:, None], state
        return delta_rule(q, k, v, beta, log_g, state, self.chunk_size)

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries and keys [B, T, H, K] of norm 1, learning rates [B, T, H] and log decays."""
        q, k = (F.normalize(part, dim=-1).to(v.dtype) for part in (q, k))  # Autocast leaves norms in float32.
        q = q * self.head_dim**-0.5
        if self.key_heads != self.heads:
            q, k = (part.repeat_interleave(self.heads // self.key_heads, 2) for part in (q, k))
        return q, k, self.b_proj(x).sigmoid(), None if self.decay is None else self.decay(x)

    def mix_shared(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        q, k, beta, log_g = self.prepare(x, q, k, v)

        def state_of(own: Any, _: int, wanted: bool) -> tuple[Tensor, Tensor | None]:
            return delta_rule_state(
                own["k"], own["v"], own["beta"], own["log_g"], self.chunk_size, with_transition=wanted
            )

        def run(own: Any, _: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return delta_rule(**own, state=state, chunk_size=self.chunk_size)

        recurrence = Recurrence(
            type(self).__name__,
            (self.heads, self.head_dim, self.v_head_dim),
            (self.head_dim, self.head_dim),
            state_of,
            run,
        )
        tensors = {"q": q, "k": k, "v": v, "beta": beta, "log_g": log_g}
        out, final = recur(cp, recurrence, tensors, return_state=return_state)
        return out, final


class GatedDeltaNetMixer(DeltaNetMixer):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a decay per head and token, SiLU gate."""

    def build_decay(self, mixer: MatrixState, hidden_size: int, **factory_kwargs: Any) -> Decay:
        return Decay(
            nn.Linear(hidden_size, mixer.heads, bias=False, **factory_kwargs), mixer.heads, None, **factory_kwargs
        )


class KimiDeltaAttention(DeltaNetMixer):
    """Kimi delta attention (arXiv 2510.26692): a decay per key channel, sigmoid gate, both of low rank."""

    sigmoid_gate = True

    def build_decay(self, mixer: MatrixState, hidden_size: int, **factory_kwargs: Any) -> Decay:
        assert isinstance(mixer, KDA)
        project = low_rank_projection(
            hidden_size, mixer.gate_rank, mixer.heads * mixer.head_dim, bias=False, **factory_kwargs
        )
        return Decay(project, mixer.heads, mixer.head_dim, **factory_kwargs)

    def build_gate(self, mixer: MatrixState, hidden_size: int, **factory_kwargs: Any) -> nn.Module:
        assert isinstance(mixer, KDA)
        return low_rank_projection(
            hidden_size, mixer.gate_rank, mixer.heads * mixer.v_head_dim, bias=mixer.gate_bias, **factory_kwargs
        )


class GatedLinearAttention(MatrixMixer):
    """Gated linear attention (Yang et al. 2023, arXiv 2312.06635): a decay per key channel of low rank, SiLU gate."""

    temperature = 16.0
    """Log gates are divided by this number, so that the state decays slowly (section 4.4)."""

    def __init__(self, mixer: GLA, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, **factory_kwargs)
        self.decay = low_rank_projection(
            hidden_size, mixer.gate_rank, mixer.heads * mixer.head_dim, bias=True, **factory_kwargs
        )

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, past_tokens: int, state: Any, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        q, log_g = q * self.head_dim**-0.5, self.log_decays(x)
        if state is not None and x.shape[1] == 1:
            out, state = recurrent_step(q[:, 0], k[:, 0], v[:, 0], None, log_g[:, 0], state)
            return out[:, None], state
        return gated_linear_attention(q, k, v, log_g, state, self.chunk_size)

    def log_decays(self, x: Tensor) -> Tensor:
        """Return the natural logarithms of the decays, [B, T, H, K]."""
        gate = self.decay(x).unflatten(-1, (self.heads, self.head_dim))
        return F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / self.temperature

    def mix_shared(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, *, return_state: bool
    ) -> tuple[Tensor, Any]:
        def state_of(own: Any, _: int, __: bool) -> tuple[Tensor, Tensor | None]:
            return gated_linear_state(own["k"], own["v"], own["log_g"], self.chunk_size)

        def run(own: Any, _: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return gated_linear_attention(**own, state=state, chunk_size=self.chunk_size)

        recurrence = Recurrence(
            type(self).__name__, (self.heads, self.head_dim, self.v_head_dim), (self.head_dim, 1), state_of, run
        )
        tensors = {"q": q * self.head_dim**-0.5, "k": k, "v": v, "log_g": self.log_decays(x)}
        out, final = recur(cp, recurrence, tensors, return_state=return_state)
        return out, final


def low_rank_projection(
    hidden_size: int, rank: int, width: int, *, bias: bool, activation: nn.Module | None = None, **factory_kwargs: Any
) -> nn.Sequential:
    """Return a projection from hidden_size to `width` through `rank` channels; the bias is on the second map.

    activation: what the channels go through; None leaves them as they are.
    """
    between = () if activation is None else (activation,)
    down = nn.Linear(hidden_size, rank, bias=False, **factory_kwargs)
    return nn.Sequential(down, *between, nn.Linear(rank, width, bias=bias, **factory_kwargs))
