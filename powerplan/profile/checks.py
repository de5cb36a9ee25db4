"""Checks before anything is timed: every implementation is compared with the reference, on a small shape."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from math import gcd
from typing import Any

import msgspec
import torch
from torch import Tensor

from powerplan import kernels
from powerplan.dims import spow_dim
from powerplan.errors import MachineError
from powerplan.ffn import MLP, MoE
from powerplan.kernels.testing import Case, arguments, budget, largest_error, plain, results, widened
from powerplan.mixers import Mamba1
from powerplan.models import Slot
from powerplan.profile.memory import is_out_of_memory
from powerplan.profile.record import Record
from powerplan.profile.result import CheckResult
from powerplan.profile.runs import kernel_settings, layer_module, random_tensor, torch_dtype
from powerplan.profile.workload import TimedMixer, Workload
from powerplan.spec import Layer

CHUNK_SIZE = 128
"""Tokens per chunk in a check."""

TOKENS = 300
"""Tokens of a check: more than two chunks, and not a multiple of them."""

RECURRENT_TOKENS = 12
"""Tokens of a check of the recurrent implementation, which goes through them one by one."""

STEPS = 44
"""Tokens of a check of a recurrent kind, whose definition goes through them one by one."""

STEP_CHUNK = 16
"""Most tokens per chunk in such a check."""

MAX_WIDTH = 256
"""Largest hidden size and FFN width in a check of a layer."""

MAX_STATE_ROWS = 10_000
"""Most rows of phi in a check, whose oracle holds phi for all tokens at once. Head dims are halved until it fits: the
checks of gpt2-small at p = 3 take 16 s of a core at head dim 64, and 1 s at 32."""

MAX_KERNEL_STATE_ROWS = 60_000
"""The same for Triton kernels, which are compiled for their head dims: these are checked wherever memory allows."""

ERROR_FACTOR = 8.0
"""A layer's error may be this many times that of the written-out definition in the same dtype."""


def check_all(
    workload: Workload, record: Record, tell: Callable[[str], None], may_begin: Callable[[], bool] = lambda: True
) -> None:
    """Check every mixer once, the cheapest first, and record the results, what cannot run here, and the mixers whose
    check `may_begin` no longer allows: these are not timed. Raises MachineError for a wrong result, and where none of
    the subjects is left."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Small products are slower in several threads, far slower so on a busy machine.
    try:
        for timed in sorted(workload.mixers, key=_cost):
            tell(f"checking {timed.name} ({timed.impl}) against the reference")
            if may_begin():
                _check(workload, timed, record)
            else:
                record.refuse(timed, "the time limit left none for its check")
            if not record.able(workload.subjects):
                raise MachineError("; ".join(missing.describe() for missing in record.missing))
    finally:
        torch.set_num_threads(threads)


def _cost(timed: TimedMixer) -> int:
    """Return what orders checks by their cost: the rows of phi, none for softmax attention; recurrent kinds last."""
    if timed.is_recurrent:
        return sys.maxsize
    return spow_dim(_checked_head_dim(timed), timed.feature.degree) if timed.feature is not None else 0


def _check(workload: Workload, timed: TimedMixer, record: Record) -> None:
    for check in (check_layer,) if timed.feature is None else (check_kernel, check_layer):
        try:
            result = check(workload, timed)
        except Exception as error:
            if not _means_cannot_run(error):
                raise
            record.refuse(timed, "out of memory in its check" if is_out_of_memory(error) else _first_line(error))
            return
        if not result.share_of_budget <= 1:
            raise MachineError(
                f"{result.name} ({result.impl}) is wrong here, so nothing is timed: {result.share_of_budget:.3g} "
                f"times the allowed error against {result.against}"
            )
        record.checks.append(result)


def _means_cannot_run(error: Exception) -> bool:
    """Whether an error says that an implementation cannot run here. Triton's own errors, such as too little shared
    memory, are of no other kind."""
    kinds = (ValueError, ImportError, TypeError, RuntimeError, MemoryError)
    return isinstance(error, kinds) or type(error).__module__.startswith("triton.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:197]}..."


def check_kernel(workload: Workload, timed: TimedMixer) -> CheckResult:
    """Compare output, final state and all gradients of power or linear attention with float64."""
    mixer = timed.feature
    assert mixer is not None
    dtype, head_dim = torch_dtype(workload.dtype), _checked_head_dim(timed)
    case = Case(
        p=mixer.degree,
        normalize=mixer.has_normaliser,
        gated=mixer.gated,
        batch=1,
        tokens=TOKENS if timed.impl != "recurrent" else RECURRENT_TOKENS,
        groups=1,
        repeats=mixer.heads // mixer.kv_heads,
        key_dim=head_dim,
        value_dim=min(head_dim, mixer.v_head_dim),
    )
    inputs = case.inputs(dtype, workload.device)
    settings = kernel_settings(mixer) | {"impl": timed.impl}
    settings["chunk_size"] = min(CHUNK_SIZE, mixer.chunk_size or CHUNK_SIZE)
    out, state = kernels.power_attention(*arguments(inputs), inputs["log_g"], return_state=True, **settings)
    measured = {name: x.cpu() for name, x in results(out, state, inputs).items()}
    exact_inputs = widened(case, case.inputs(dtype))
    exact = results(*plain(case, exact_inputs), exact_inputs)
    allowed = budget(case, dtype, low_products=timed.impl == "triton")
    share = max(largest_error(measured[name], exact[name]) / allowed[name] for name in exact)
    against = f"float64, output, state and gradients, {case.tokens} tokens, head dim {head_dim}"
    return CheckResult(timed.name, timed.impl, share, against)


def _checked_head_dim(timed: TimedMixer) -> int:
    """Return the key head dim of a check of power or linear attention: the mixer's, halved until phi fits, and even as
    RoPE needs it."""
    mixer, most = timed.feature, MAX_KERNEL_STATE_ROWS if timed.impl == "triton" else MAX_STATE_ROWS
    assert mixer is not None
    head_dim: int = mixer.head_dim
    while spow_dim(head_dim, mixer.degree) > most:
        head_dim = head_dim // 4 * 2
    return head_dim


def check_layer(workload: Workload, timed: TimedMixer) -> CheckResult:
    """Compare output and input gradient with those of a layer of the same weights whose mixer is written out by its
    definition, in float64. The error of that layer in the dtype itself sets the scale.

    The definition of a recurrent kind is its recurrence, one token at a time.
    """
    small, timed = reduced(workload, timed)
    tokens = RECURRENT_TOKENS if timed.impl == "recurrent" else TOKENS
    if timed.is_recurrent:
        tokens = STEPS
    module, x = layer_module(small, timed), random_tensor(small, tokens, small.spec.hidden_size)
    if timed.feature is not None:
        _align_queries(module.mixer)

    def output_and_gradient(layer: Any, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        out = layer(x)
        grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        return [x.detach().double().cpu() for x in (out, *torch.autograd.grad(out, x, grad_out))]

    def by_definition(dtype: torch.dtype) -> list[Tensor]:
        layer = layer_module(small, timed, "cpu", dtype)
        layer.load_state_dict(module.state_dict())
        if timed.is_recurrent:
            return output_and_gradient(partial(_token_by_token, layer), x.to("cpu", dtype))
        layer.mixer.mix = lambda q, k, v, log_g, state, return_state: (definition(timed, q, k, v, log_g), state)
        return output_and_gradient(layer, x.to("cpu", dtype))

    dtype, shares = torch_dtype(workload.dtype), []
    measured, same_dtype, exact = output_and_gradient(module, x), by_definition(dtype), by_definition(torch.float64)
    for ours, usual, truth in zip(measured, same_dtype, exact, strict=True):
        allowed = ERROR_FACTOR * (largest_error(usual, truth) + torch.finfo(dtype).eps * float(truth.abs().max()))
        shares.append(largest_error(ours, truth) / allowed)
    against = f"float64, output and gradient, {tokens} tokens"
    return CheckResult(f"layer with {timed.name}", timed.impl, max(shares), against)


def _token_by_token(layer: Any, x: Tensor) -> Tensor:
    """Return the output of a layer that meets the tokens of x [B, T, m] one by one, and remembers them in a slot."""
    slot = Slot()
    return torch.cat([layer(token, slot) for token in torch.split(x, 1, 1)], 1)


def definition(timed: TimedMixer, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> Tensor:
    """Return the mixer's output by its definition, with all T^2 weights: q [B, T, H, K], k [B, T, G, K], v [B, T, G, V]
    and log_g [B, T, G] or None -> [B, T, H, V]."""
    if timed.feature is not None:
        out: Tensor = kernels.power_attention(q, k, v, log_g, impl="reference", **kernel_settings(timed.feature))
        return out
    mixer = timed.mixer
    repeats, tokens = timed.shape.heads // timed.shape.kv_heads, q.shape[1]
    keys, values = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    if mixer.window_size is not None:
        visible = visible.triu(1 - mixer.window_size)
    scores = torch.einsum("bthk,bshk->bhts", q, keys) * timed.shape.head_dim**-0.5
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~visible, -torch.inf).softmax(-1), values)


def _align_queries(module: Any) -> None:
    """Make each query's product with its own key positive: a sum of weights near 0 amplifies rounding without bound."""
    groups, repeats = module.kv_heads, module.heads // module.kv_heads
    with torch.no_grad():
        for query, key in zip(module.q_proj.parameters(), module.k_proj.parameters(), strict=True):
            heads = key.unflatten(0, (groups, 1, -1)).expand(-1, repeats, *([-1] * key.ndim))
            query.copy_(heads.reshape(query.shape))


def reduced(workload: Workload, timed: TimedMixer) -> tuple[Workload, TimedMixer]:
    """Return a layer of the same structure with smaller sizes: heads, head dims, hidden size, FFN width and window."""
    mixer: Any = timed.mixer
    if timed.is_recurrent:
        # A few heads, or channels of the first Mamba, and chunks of a size that the tokens are no multiple of.
        parts = mixer.width_divisor()
        mixer = mixer.widened(Fraction(gcd(parts, 64 if isinstance(mixer, Mamba1) else 4), parts))
        changes = {"chunk_size": min(mixer.chunk_size, STEP_CHUNK)} if timed.chunk_size else {}
    else:
        groups = min(mixer.kv_heads, 2)
        changes = {"heads": groups * min(mixer.heads // mixer.kv_heads, 4), "kv_heads": groups}
    if timed.feature is not None:
        head_dim = _checked_head_dim(timed)
        if head_dim != mixer.head_dim:
            changes |= {"head_dim": head_dim, "v_head_dim": min(head_dim, mixer.v_head_dim)}
        changes["chunk_size"] = CHUNK_SIZE
    elif mixer.window_size is not None:
        changes["window"] = min(mixer.window_size, 40)
    mixer, ffn = msgspec.structs.replace(mixer, **changes), workload.ffn
    if isinstance(ffn, MLP | MoE):
        ffn = msgspec.structs.replace(ffn, intermediate_size=min(ffn.intermediate_size, MAX_WIDTH))
    if isinstance(ffn, MoE):
        # Every token takes all experts: rounding could change the choice of one between two of equal score.
        shared = min(ffn.shared_intermediate_size, MAX_WIDTH)
        ffn = msgspec.structs.replace(
            ffn, experts=4, top_k=4, shared_intermediate_size=shared, groups=1, top_groups=None
        )
    spec = msgspec.structs.replace(workload.spec, hidden_size=min(workload.spec.hidden_size, MAX_WIDTH))
    return replace(workload, batch=1, spec=spec, layer=Layer(mixer=mixer, ffn=ffn)), replace(timed, mixer=mixer)
