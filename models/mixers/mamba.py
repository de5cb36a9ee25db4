"""Mamba and Mamba-2, by scans.py, and log-linear attention over Mamba-2, by fenwick.py.

Shapes: B batch, T tokens, m hidden size, I inner width, H heads, V channels of a head, G groups, N state dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.errors import InputError
from powerplan.kernels.distributed.recurrence import Recurrence, recur
from powerplan.mixers import LogLinear, Mamba1, Mamba2
from powerplan.models.mixers.base import SequenceMixer
from powerplan.models.mixers.convolution import ShortConvolution
from powerplan.models.mixers.delta import draw_steps
from powerplan.models.mixers.fenwick import log_linear_scan, log_linear_state, log_linear_step
from powerplan.models.mixers.matrix import MatrixMixerState
from powerplan.models.mixers.scans import (
    grouped_scan,
    grouped_state,
    grouped_step,
    selective_scan,
    selective_state,
    selective_step,
)

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class GroupedNorm(nn.Module):
    """RMSNorm of each of `groups` equal parts of the features, [..., width] -> [..., width], with `width` weights."""

    def __init__(self, width: int, groups: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(width, **factory_kwargs))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.unflatten(x, -1, (self.groups, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], eps=1e-6).flatten(-2)
        return (normed * self.weight).to(x.dtype)

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Set the weights to 1."""
        self.weight.fill_(1)


class Mamba2Mixer(SequenceMixer):
    """[B, T, m] -> [B, T, m]: Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7): project, convolve, scan, gate.

    The output is gated before its norm, and each group has a norm of its own, as in mamba_ssm's Mamba2.
    """

    def __init__(self, mixer: Mamba2, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.chunk_size = mixer.heads, mixer.groups, mixer.chunk_size
        inner, shared = mixer.inner_size, mixer.groups * mixer.state_dim
        self.sizes = [inner, inner + 2 * shared, mixer.heads, *self.more_projections(mixer)]
        self.convolved = [inner, shared, shared]
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=mixer.bias, **factory_kwargs)
        self.o_proj = nn.Linear(inner, hidden_size, bias=mixer.bias, **factory_kwargs)
        width, channels = mixer.conv_size, sum(self.convolved)
        self.convolution = ShortConvolution(channels, width, mixer.conv_bias, **factory_kwargs) if width else None
        self.a_log = nn.Parameter(torch.empty(mixer.heads, **factory_kwargs))
        self.dt_bias = nn.Parameter(torch.empty(mixer.heads, **factory_kwargs))
        self.skip = nn.Parameter(torch.empty(mixer.heads, 1, **factory_kwargs))
        self.output_norm = GroupedNorm(inner, mixer.groups, **factory_kwargs) if mixer.gated_norm else None
        Mamba2Mixer.init_weights(self, 1.0)  # A subclass has further weights, which are not made yet.

    def more_projections(self, mixer: Mamba2) -> list[int]:
        """Return the widths of what is projected beside gate, convolved channels and step sizes."""
        return []

    def run(self, x: Tensor, past_tokens: int, state: Any, *, return_state: bool) -> tuple[Tensor, Any]:
        heads_state, conv_inputs = (None, None) if state is None else state
        gate, channels, dt, *more = self.in_proj(x).split(self.sizes, -1)
        if self.convolution is not None:
            channels, conv_inputs = self.convolution(channels, conv_inputs)
        c, b, inputs, step, log_g = self.prepare(channels, dt)
        out, heads_state = self.scan(c, b, inputs * step[..., None], log_g, more, past_tokens, heads_state)
        return self.merge(out, inputs, gate), MatrixMixerState(heads_state, conv_inputs) if return_state else None

    def run_shared(self, x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Any]:
        conv_inputs = None
        gate, channels, dt, *more = self.in_proj(x).split(self.sizes, -1)
        if self.convolution is not None:
            channels, conv_inputs = self.convolution.run_shared(channels, cp, return_state=return_state)
        c, b, inputs, step, log_g = self.prepare(channels, dt)
        out, state = self.scan_shared(c, b, inputs * step[..., None], log_g, more, cp, return_state=return_state)
        return self.merge(out, inputs, gate), MatrixMixerState(state, conv_inputs) if return_state else None

    def prepare(self, channels: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return c, b [B, T, G, N], the inputs [B, T, H, V], step sizes and log decays [B, T, H].

        channels: convolved [B, T, I + 2 G N]. dt: [B, T, H].
        """
        inputs, b, c = torch.split(F.silu(channels), self.convolved, -1)
        b, c = (torch.unflatten(part, -1, (self.groups, -1)) for part in (b, c))
        dtype = torch.promote_types(dt.dtype, torch.float32)
        step = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        return c, b, torch.unflatten(inputs, -1, (self.heads, -1)), step, -self.a_log.to(dtype).exp() * step

    def merge(self, out: Tensor, inputs: Tensor, gate: Tensor) -> Tensor:
        """Return the heads' outputs [B, T, H, V] with the skip, gated, normalised and back in the hidden size."""
        out = (out + self.skip * inputs).to(inputs.dtype).flatten(-2) * F.silu(gate)
        if self.output_norm is not None:
            out = self.output_norm(out)
        result: Tensor = self.o_proj(out)
        return result

    def scan(
        self, c: Tensor, b: Tensor, x: Tensor, log_g: Tensor, more: list[Tensor], past_tokens: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Return the heads' outputs [B, T, H, V], and their state after these tokens.

        c, b: [B, T, G, N]. x: [B, T, H, V], times the step sizes. log_g: [B, T, H]. more: what `more_projections` asks
        for. state: what an earlier call returned for the tokens before these; None if there are none.
        """
        if state is not None and x.shape[1] == 1:
            out, state = grouped_step(c[:, 0], b[:, 0], x[:, 0], log_g[:, 0], state)
            return out[:, None], state
        return grouped_scan(c, b, x, log_g, state, self.chunk_size)

    def scan_shared(
        self,
        c: Tensor,
        b: Tensor,
        x: Tensor,
        log_g: Tensor,
        more: list[Tensor],
        cp: ContextParallel,
        *,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the same of this rank's tokens of sequences that lie on several ranks, the state after all of their
        tokens, on every rank, if `return_state`.
        """

        def state_of(own: Any, _: int, __: bool) -> tuple[Tensor, Tensor]:
            state, decay = grouped_state(own["b"], own["v"], own["log_g"])
            return by_head(state), decay[..., None, None]

        def run(own: Any, _: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
            before = None if state is None else by_group(state, self.groups)
            out, after = grouped_scan(own["c"], own["b"], own["v"], own["log_g"], before, self.chunk_size)
            return out, by_head(after)

        state_size = (self.heads, b.shape[-1], x.shape[-1])
        recurrence = Recurrence(type(self).__name__, state_size, (1, 1), state_of, run)
        tensors = {"c": c, "b": b, "v": x, "log_g": log_g}
        out, state = recur(cp, recurrence, tensors, return_state=return_state)
        return out, None if state is None else by_group(state, self.groups)

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Draw exp(a_log) uniform in [1, 16] and steps log-uniform in [0.001, 0.1]; the skip is 1."""
        self.a_log.uniform_(1, 16).log_()
        draw_steps(self.dt_bias)
        self.skip.fill_(1)


def by_head(state: Tensor) -> Tensor:
    """[B, G, K, R, V], as scans have the states of the heads of a group -> [B, H, K, V], as ranks exchange them."""
    return state.transpose(2, 3).flatten(1, 2)


def by_group(state: Tensor, groups: int) -> Tensor:
    """[B, H, K, V] -> [B, G, K, R, V]."""
    return torch.unflatten(state, 1, (groups, -1)).transpose(2, 3)


class LogLinearMixer(Mamba2Mixer):
    """[B, T, m] -> [B, T, m]: Mamba-2 with the states of a Fenwick tree (Guo et al. 2025, arXiv 2506.04761).

    The weights of the levels are softplus(level_scale x projection), as in flash-linear-attention's LogLinearMamba2.

    Raises:
        InputError: Chunks are no power of 2, when it is built; or a sequence is longer than the levels reach.
    """

    def __init__(self, mixer: LogLinear, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__(mixer, hidden_size, **factory_kwargs)
        if mixer.chunk_size & (mixer.chunk_size - 1):
            below = 1 << mixer.chunk_size.bit_length() - 1
            raise InputError(
                f"chunk_size: log_linear layers are built with a power of 2, such as {below:,} or {2 * below:,}; "
                f"{mixer.chunk_size:,} is none"
            )
        self.max_levels = mixer.max_levels
        self.level_scale = nn.Parameter(torch.ones(mixer.heads, mixer.max_levels, **factory_kwargs))

    def more_projections(self, mixer: Mamba2) -> list[int]:
        assert isinstance(mixer, LogLinear)
        return [mixer.heads * mixer.max_levels]

    def scan(
        self, c: Tensor, b: Tensor, x: Tensor, log_g: Tensor, more: list[Tensor], past_tokens: int, state: Any
    ) -> tuple[Tensor, Any]:
        self.check_context(past_tokens + x.shape[1])
        weight = self.level_weights(more, x.dtype)
        if state is not None and x.shape[1] == 1:
            out, state = log_linear_step(c[:, 0], b[:, 0], x[:, 0], log_g[:, 0], weight[:, 0], state, past_tokens)
            return out[:, None], state
        return log_linear_scan(c, b, x, log_g, weight, state, past_tokens, self.chunk_size)

    def check_context(self, tokens: int) -> None:
        """Raise InputError for a sequence that is longer than the levels reach."""
        longest = 1 << self.max_levels - 1
        if tokens > longest:
            raise InputError(f"{tokens:,} tokens do not fit max_levels {self.max_levels}, which reach {longest:,}")

    def level_weights(self, more: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weights of the levels, [B, T, H, L]."""
        (projected,) = more
        projected = torch.unflatten(projected, -1, (self.heads, -1)).to(dtype)
        return F.softplus(self.level_scale.to(dtype) * projected)

    def scan_shared(
        self,
        c: Tensor,
        b: Tensor,
        x: Tensor,
        log_g: Tensor,
        more: list[Tensor],
        cp: ContextParallel,
        *,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Ranks exchange the states of all bits that the longest sequence may have. Which of them merge over a rank's
        tokens depends on their places alone: as a matrix of 0 and 1 times the decay, that is a transition."""
        self.check_context(cp.layout.longest_sequence)
        levels = cp.layout.longest_sequence.bit_length()

        def to_wire(states: Tensor) -> Tensor:
            """[B, l, G, K, R, V] of some of the bits -> [B, H, L, K V]."""
            states = torch.cat(
                (states, states.new_zeros(*states.shape[:1], levels - states.shape[1], *states.shape[2:])), 1
            )
            return states.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)

        def from_wire(states: Tensor, bits: int) -> Tensor:
            """[B, H, L, K V] -> [B, l, G, K, R, V] of the first bits."""
            states = torch.unflatten(states[:, :, :bits], 3, (b.shape[-1], -1))
            return torch.unflatten(states, 1, (self.groups, -1)).permute(0, 3, 1, 4, 2, 5)

        def state_of(own: Any, first: int, _: bool) -> tuple[Tensor, Tensor]:
            states, transition = log_linear_state(own["b"], own["v"], own["log_g"], first, levels)
            return to_wire(states), transition

        def run(own: Any, first: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
            before = None if state is None else from_wire(state, first.bit_length())
            given = {"x" if name == "v" else name: part for name, part in own.items()}
            out, after = log_linear_scan(**given, state=before, past_tokens=first, chunk_size=self.chunk_size)
            return out, to_wire(after)

        state_size = (self.heads, levels, b.shape[-1] * x.shape[-1])
        recurrence = Recurrence(type(self).__name__, state_size, (levels, levels), state_of, run)
        tensors = {"c": c, "b": b, "v": x, "log_g": log_g, "weight": self.level_weights(more, x.dtype)}
        out, state = recur(cp, recurrence, tensors, return_state=return_state)
        return out, None if state is None else from_wire(state, levels)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Draw the weights of Mamba-2; the scales of the levels are 1."""
        super().init_weights(std)
        self.level_scale.fill_(1)


class Mamba1Mixer(SequenceMixer):
    """[B, T, m] -> [B, T, m]: Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.4): project, convolve, scan, gate."""

    def __init__(self, mixer: Mamba1, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        inner, state_dim, rank, width = mixer.inner_size, mixer.state_dim, mixer.dt_rank, mixer.conv_size
        self.sizes = [rank, state_dim, state_dim]
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=mixer.bias, **factory_kwargs)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False, **factory_kwargs)
        self.dt_proj = nn.Linear(rank, inner, bias=False, **factory_kwargs)
        self.o_proj = nn.Linear(inner, hidden_size, bias=mixer.bias, **factory_kwargs)
        self.convolution = ShortConvolution(inner, width, mixer.conv_bias, **factory_kwargs) if width else None
        self.norms = None
        if mixer.inner_norms:
            self.norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6, **factory_kwargs) for size in self.sizes)
        self.a_log = nn.Parameter(torch.empty(inner, state_dim, **factory_kwargs))
        self.dt_bias = nn.Parameter(torch.empty(inner, **factory_kwargs))
        self.skip = nn.Parameter(torch.empty(inner, **factory_kwargs))
        self.init_weights(1.0)

    def run(self, x: Tensor, past_tokens: int, state: Any, *, return_state: bool) -> tuple[Tensor, Any]:
        scanned, conv_inputs = (None, None) if state is None else state
        channels, gate = self.in_proj(x).chunk(2, -1)
        if self.convolution is not None:
            channels, conv_inputs = self.convolution(channels, conv_inputs)
        channels, step, rate, b, c = self.prepare(channels)
        if scanned is not None and x.shape[1] == 1:
            out, scanned = selective_step(channels[:, 0], step[:, 0], rate, b[:, 0], c[:, 0], scanned)
            out = out[:, None]
        else:
            out, scanned = selective_scan(channels, step, rate, b, c, scanned)
        return self.merge(out, channels, gate), MatrixMixerState(scanned, conv_inputs) if return_state else None

    def run_shared(self, x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Any]:
        conv_inputs = None
        channels, gate = self.in_proj(x).chunk(2, -1)
        if self.convolution is not None:
            channels, conv_inputs = self.convolution.run_shared(channels, cp, return_state=return_state)
        channels, step, rate, b, c = self.prepare(channels)

        def state_of(own: Any, _: int, __: bool) -> tuple[Tensor, Tensor]:
            state, transition = selective_state(own["v"], own["step"], rate, own["b"])
            return state[..., None], transition[..., None]

        def run(own: Any, _: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
            before = None if state is None else state[..., 0]
            out, after = selective_scan(own["v"], own["step"], rate, own["b"], own["c"], before)
            return out, after[..., None]

        # To the exchange every channel is a head whose keys have N features and whose values have one.
        inner, state_dim = rate.shape
        recurrence = Recurrence(type(self).__name__, (inner, state_dim, 1), (state_dim, 1), state_of, run, (rate,))
        tensors = {"v": channels, "step": step, "b": b, "c": c}
        out, scanned = recur(cp, recurrence, tensors, return_state=return_state)
        state = None if scanned is None else MatrixMixerState(scanned[..., 0], conv_inputs)
        return self.merge(out, channels, gate), state

    def prepare(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the inputs and step sizes [B, T, I], the rates [I, N], and b and c [B, T, N].

        channels: convolved [B, T, I].
        """
        channels = F.silu(channels)
        parts = self.x_proj(channels).split(self.sizes, -1)
        if self.norms is not None:
            parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        dt, b, c = parts
        dtype = torch.promote_types(channels.dtype, torch.float32)
        step = F.softplus(self.dt_proj(dt).to(dtype) + self.dt_bias.to(dtype))
        return channels, step, -self.a_log.to(dtype).exp(), b, c

    def merge(self, out: Tensor, channels: Tensor, gate: Tensor) -> Tensor:
        """Return the outputs of the scan [B, T, I] with the skip, gated and back in the hidden size."""
        result: Tensor = self.o_proj((out + self.skip * channels).to(channels.dtype) * F.silu(gate))
        return result

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Set exp(a_log) to 1 ... N (S4D-Real, section 3.6), draw steps log-uniform in [0.001, 0.1]; the skip is 1."""
        self.a_log.fill_(1)
        self.a_log.copy_(self.a_log.cumsum(1).log())
        draw_steps(self.dt_bias)
        self.skip.fill_(1)
