"""Runs of recurrent mixers alone: their recurrence in chunks, from its inputs to its output, or one more token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from powerplan.mixers import GLA, GSA, KDA, RWKV7, LogLinear, Mamba1, Mamba2
from powerplan.mixers.delta import DeltaRule
from powerplan.models.mixers.fenwick import log_linear_scan, log_linear_step
from powerplan.models.mixers.recurrence import delta_rule, gated_linear_attention, recurrent_step
from powerplan.models.mixers.rwkv import rank_one_rule, rank_one_step
from powerplan.models.mixers.scans import grouped_scan, grouped_step, selective_scan, selective_step
from powerplan.models.mixers.slots import slot_attention, slot_step
from powerplan.profile.workload import TimedMixer, Workload

Function = Callable[..., tuple[Tensor, Any]]
"""From the inputs to outputs and states; a step also takes the state before it."""

STRONGEST = 0.01
"""Log decays are drawn between this, negated, and 0."""


def recurrence_inputs(workload: Workload, timed: TimedMixer, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random inputs of a mixer's recurrence, tokens in the second dimension of all but Mamba's rates.

    Heads are of `dtype`, decays, step sizes and weights of levels float32, as the modules hand them over.
    """
    mixer, shape = timed.mixer, timed.shape
    size = (workload.batch, tokens)

    def drawn(*features: int) -> Tensor:
        return torch.randn(*size, *features, device=workload.device, dtype=dtype)

    def decays(*features: int) -> Tensor:
        return torch.rand(*size, *features, device=workload.device) * -STRONGEST

    keys, values = (shape.heads, shape.head_dim), (shape.heads, shape.v_head_dim)
    if isinstance(mixer, Mamba1):
        rate = -torch.rand(mixer.inner_size, mixer.state_dim, device=workload.device)
        channels = [drawn(mixer.inner_size), -decays(mixer.inner_size), rate]
        return [*channels, drawn(mixer.state_dim), drawn(mixer.state_dim)]
    if isinstance(mixer, Mamba2):
        shared = (mixer.groups, mixer.state_dim)
        levels = []
        if isinstance(mixer, LogLinear):
            levels.append(torch.rand(*size, mixer.heads, mixer.max_levels, device=workload.device))
        return [drawn(*shared), drawn(*shared), drawn(*values), decays(mixer.heads), *levels]
    unit = F.normalize(drawn(*keys), dim=-1)
    if isinstance(mixer, RWKV7):
        return [drawn(*keys), drawn(*keys), drawn(*values), -unit, unit * 0.5, decays(*keys)]
    if isinstance(mixer, GSA):
        return [drawn(*keys), drawn(*keys), drawn(*values), decays(mixer.heads, mixer.slots)]
    if isinstance(mixer, GLA):
        return [drawn(*keys), drawn(*keys), drawn(*values), decays(*keys)]
    assert isinstance(mixer, DeltaRule)
    beta = drawn(mixer.heads).sigmoid()
    gates = [] if not mixer.decay else [decays(*(keys if isinstance(mixer, KDA) else keys[:1]))]
    return [drawn(*keys), unit, drawn(*values), beta, *gates]


def recurrence_of(timed: TimedMixer) -> Function:
    """Return the recurrence in chunks as a function of `recurrence_inputs`, to outputs and the last state."""
    mixer: Any = timed.mixer
    if isinstance(mixer, Mamba1):
        return lambda x, step, rate, b, c: selective_scan(x, step, rate, b, c, None)
    if isinstance(mixer, DeltaRule):
        return lambda q, k, v, beta, log_g=None: delta_rule(q, k, v, beta, log_g, None, mixer.chunk_size)
    if isinstance(mixer, LogLinear):
        return lambda c, b, x, log_g, weight: log_linear_scan(c, b, x, log_g, weight, None, 0, mixer.chunk_size)
    functions: dict[type[Any], Function] = {
        Mamba2: grouped_scan,
        RWKV7: rank_one_rule,
        GSA: slot_attention,
        GLA: gated_linear_attention,
    }
    function = functions[type(mixer)]
    return lambda *inputs: function(*inputs, None, mixer.chunk_size)


def recurrence_step(workload: Workload, timed: TimedMixer, context: int, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a run for one more token after `context` tokens. The state is that after one token: its size counts."""
    mixer = timed.mixer
    inputs = recurrence_inputs(workload, timed, 1, dtype)
    with torch.no_grad():
        _, state = recurrence_of(timed)(*inputs)
    if isinstance(mixer, Mamba1):
        x, step, rate, b, c = inputs
        return lambda: selective_step(x[:, 0], step[:, 0], rate, b[:, 0], c[:, 0], state)
    token = [part[:, 0] for part in inputs]
    if isinstance(mixer, LogLinear):
        states = state.repeat_interleave(context.bit_length(), 1)
        c, b, x, log_g, weight = token
        return lambda: log_linear_step(c, b, x, log_g, weight, states, context)
    if isinstance(mixer, DeltaRule):
        q, k, v, beta, *gates = token
        return lambda: recurrent_step(q, k, v, beta, gates[0] if gates else None, state)
    if isinstance(mixer, GLA):
        q, k, v, log_g = token
        return lambda: recurrent_step(q, k, v, None, log_g, state)
    steps: dict[type[Any], Function] = {Mamba2: grouped_step, RWKV7: rank_one_step, GSA: slot_step}
    step_function = steps[type(mixer)]
    return lambda: step_function(*token, state)
