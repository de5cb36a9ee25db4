"""Delta rules (DeltaNet, gated DeltaNet, Kimi delta attention) and gated linear attention, by recurrence.py."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.mixers import GLA, KDA
from powerplan.mixers.linear import MatrixState
from powerplan.models.mixers.matrix import MatrixMixer
from powerplan.models.mixers.recurrence import delta_rule, gated_linear, step


class Decay(nn.Module):
    """Log decay -exp(A_h) softplus(x + dt_bias) of each head h [B, T, H], or of its key channels [B, T, H, K].

    `project` gives x, one per head (gated DeltaNet) or of low rank per channel (KDA). Computed in float32 at least.
    """

    def __init__(self, project: nn.Module, heads: int, channels: int | None, **settings: Any) -> None:
        super().__init__()
        self.project = project
        self.a_log = nn.Parameter(torch.empty(heads, **settings))
        self.dt_bias = nn.Parameter(torch.empty((heads,) if channels is None else (heads, channels), **settings))
        self.init_weights(1.0)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        rate = self.a_log.to(dtype).exp()
        size = self.project(x).to(dtype).unflatten(-1, self.dt_bias.shape) + self.dt_bias.to(dtype)
        return -(rate if size.ndim == 3 else rate[:, None]) * F.softplus(size)

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Draw A uniform in [1, 16], and steps dt log-uniform in [0.001, 0.1], as in Mamba-2 and gated DeltaNet."""
        self.a_log.uniform_(1, 16).log_()
        steps = self.dt_bias.uniform_(math.log(0.001), math.log(0.1)).exp_()
        self.dt_bias.copy_(steps + (-torch.expm1(-steps)).log())


class DeltaNetMixer(MatrixMixer):
    """DeltaNet (Yang et al. 2024, arXiv 2406.06484): queries and keys of norm 1, a learning rate per head, no decay."""

    activated = True

    def __init__(self, mixer: MatrixState, hidden: int, **settings: Any) -> None:
        super().__init__(mixer, hidden, **settings)
        self.b_proj = nn.Linear(hidden, mixer.heads, bias=False, **settings)
        self.decay = self.build_decay(mixer, hidden, **settings)

    def build_decay(self, mixer: MatrixState, hidden: int, **settings: Any) -> Decay | None:
        """Return the module of the log decays, or None without."""
        return None

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: int, memory: Any, *, keep: bool
    ) -> tuple[Tensor, Any]:
        q, k = (F.normalize(part, dim=-1).to(v.dtype) for part in (q, k))  # Autocast leaves norms in float32.
        q = q * self.head_dim**-0.5
        if self.key_heads != self.heads:
            q, k = (part.repeat_interleave(self.heads // self.key_heads, 2) for part in (q, k))
        beta = self.b_proj(x).sigmoid()
        log_g = None if self.decay is None else self.decay(x)
        if memory is not None and x.shape[1] == 1:
            last = None if log_g is None else log_g[:, 0]
            out, memory = step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], last, memory)
            return out[:, None], memory
        return delta_rule(q, k, v, beta, log_g, memory, self.chunk_size)


class GatedDeltaNetMixer(DeltaNetMixer):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a decay per head and token, SiLU gate."""

    def build_decay(self, mixer: MatrixState, hidden: int, **settings: Any) -> Decay:
        return Decay(nn.Linear(hidden, mixer.heads, bias=False, **settings), mixer.heads, None, **settings)


class KimiDeltaAttention(DeltaNetMixer):
    """Kimi delta attention (arXiv 2510.26692): a decay per key channel, sigmoid gate, both of low rank."""

    sigmoid_gate = True

    def build_decay(self, mixer: MatrixState, hidden: int, **settings: Any) -> Decay:
        assert isinstance(mixer, KDA)
        project = low_rank(hidden, mixer.gate_rank, mixer.heads * mixer.head_dim, bias=False, **settings)
        return Decay(project, mixer.heads, mixer.head_dim, **settings)

    def build_gate(self, mixer: MatrixState, hidden: int, **settings: Any) -> nn.Module:
        assert isinstance(mixer, KDA)
        return low_rank(hidden, mixer.gate_rank, mixer.heads * mixer.v_head_dim, bias=mixer.gate_bias, **settings)


class GatedLinearAttention(MatrixMixer):
    """Gated linear attention (Yang et al. 2023, arXiv 2312.06635): a decay per key channel of low rank, SiLU gate."""

    temperature = 16.0
    """Divides the logarithm of the gate, so that the state decays slowly (section 4.4)."""

    def __init__(self, mixer: GLA, hidden: int, **settings: Any) -> None:
        super().__init__(mixer, hidden, **settings)
        self.decay = low_rank(hidden, mixer.gate_rank, mixer.heads * mixer.head_dim, bias=True, **settings)

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: int, memory: Any, *, keep: bool
    ) -> tuple[Tensor, Any]:
        q = q * self.head_dim**-0.5
        gate = self.decay(x).unflatten(-1, (self.heads, self.head_dim))
        log_g = F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / self.temperature
        if memory is not None and x.shape[1] == 1:
            out, memory = step(q[:, 0], k[:, 0], v[:, 0], None, log_g[:, 0], memory)
            return out[:, None], memory
        return gated_linear(q, k, v, log_g, memory, self.chunk_size)


def low_rank(hidden: int, rank: int, width: int, *, bias: bool, **settings: Any) -> nn.Sequential:
    """Return a projection through `rank` channels, m rank + rank width weights; the bias is the last one's."""
    return nn.Sequential(nn.Linear(hidden, rank, bias=False, **settings), nn.Linear(rank, width, bias=bias, **settings))
