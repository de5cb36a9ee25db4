"""Is the result right? Power attention within its error budget, softmax peers likewise, before anything is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from powerplan.dims import spow_dim
from powerplan.kernels import empty_state, power_attention, power_attention_step
from powerplan.kernels.testing import Case, arguments, budget, largest_error, plain, results, widened
from support.peers import forward_of, layout, step_impl
from support.shapes import DTYPES, Shape, Variant, normalized, window_of_equal_state

TOKENS = 300
CHUNK = 128
STEPS = 12
LARGEST_STATE = 60_000
"""Rows of phi that the oracle can hold for all tokens of a check; head dims past it are checked at a smaller one."""

FACTOR = 8.0
"""A softmax peer may be this many times as far from float64 as plain torch in the same dtype."""


@dataclass(frozen=True)
class Checked:
    """The largest error of a check as a share of what is allowed, and what was compared."""

    share_of_budget: float
    against: str

    @property
    def passed(self) -> bool:
        return self.share_of_budget <= 1


def check(shape: Shape, variant: Variant) -> Checked | None:
    """Return how far `variant` is from float64 on a small shape like `shape`; None where there is no common definition.

    Raises UnavailableError, or what the implementation raises.
    """
    if variant.is_power:
        return _check_step(shape, variant) if shape.kind == "decode" else _check_power(shape, variant)
    if variant.is_softmax or variant.impl.endswith("window"):
        return _check_softmax(replace(shape, kind="forward"), variant)
    return None


def _case(shape: Shape, variant: Variant, tokens: int) -> Case:
    p, d = variant.p or 2, shape.head_dim
    while spow_dim(d, p) > LARGEST_STATE:
        d //= 2
    return Case(
        p=p,
        normalize=normalized(variant),
        gated=bool(variant.gated),
        batch=1,
        tokens=tokens,
        groups=1,
        repeats=shape.heads // shape.kv_heads,
        key_dim=d,
        value_dim=d,
    )


def _check_power(shape: Shape, variant: Variant) -> Checked:
    """Output, state and all gradients, in chunks of at most 128 of 300 tokens."""
    case = _case(shape, variant, TOKENS)
    return compared(case, variant, DTYPES[shape.dtype], shape.device, min(CHUNK, variant.chunk or CHUNK))


def compared(
    case: Case, variant: Variant, dtype: torch.dtype, device: str, chunk: int, oracle_device: str = "cpu"
) -> Checked:
    """Compare output, state and all gradients of power attention with float64, which runs on `oracle_device`."""
    inputs = case.inputs(dtype, device)
    out, state = power_attention(
        *arguments(inputs),
        inputs["log_g"],
        p=case.p,
        normalize=case.normalize,
        chunk_size=chunk,
        return_state=True,
        impl=variant.impl.removeprefix("power-"),
    )
    found = {name: x.to(oracle_device) for name, x in results(out, state, inputs).items()}
    wide = widened(case, case.inputs(dtype, oracle_device))
    # Triton multiplies in the inputs' dtype; the torch engine in float32, and is held to that.
    low_products = variant.impl == "power-triton" and dtype != torch.float32
    exact = results(*plain(case, wide), wide)
    allowed = budget(case, dtype, low_products=low_products, device=oracle_device)
    share = max(largest_error(found[name], exact[name]) / allowed[name] for name in exact)
    return Checked(share, f"float64, output, state and gradients, {case.tokens} tokens, head dim {case.key_dim}")


def _check_step(shape: Shape, variant: Variant) -> Checked:
    """Steps from an empty state against the whole in float64."""
    dtype = DTYPES[shape.dtype]
    case = _case(shape, variant, STEPS)
    inputs = case.inputs(dtype, shape.device)
    q, k, v = arguments(inputs)
    log_g = inputs["log_g"]
    state, outs = empty_state(k, v, case.p, case.normalize), []
    for token in range(STEPS):
        gate = None if log_g is None else log_g[:, token]
        now = (q[:, token], k[:, token], v[:, token], gate, state)
        with torch.no_grad():
            out, state = power_attention_step(*now, p=case.p, normalize=case.normalize, impl=step_impl(variant))
        outs.append(out)
    wide = widened(case, case.inputs(dtype))
    exact, allowed = plain(case, wide)[0], budget(case, dtype)["out"]
    share = largest_error(torch.stack(outs, 1).cpu(), exact.detach()) / allowed
    return Checked(share, f"float64, {STEPS} steps, head dim {case.key_dim}")


def _check_softmax(shape: Shape, variant: Variant) -> Checked:
    width = window_of_equal_state(shape, variant.p or 2) if variant.impl.endswith("window") else None
    small = replace(shape, batch=1, tokens=TOKENS if width is None else max(TOKENS, 2 * width + 3))
    if small.tokens > 5000:
        small = replace(small, head_dim=32, tokens=2 * window_of_equal_state(replace(shape, head_dim=32), 2) + 3)
        variant = replace(variant, p=2 if width else None)
        width = window_of_equal_state(small, 2)
    made = small.inputs()
    q, k, v = (layout(variant, made[name]) for name in "qkv")
    out = forward_of(variant, small)(q, k, v, made["log_g"])
    usual, exact = _softmax(q, k, v, width), _softmax(q.double(), k.double(), v.double(), width)
    rounding = torch.finfo(q.dtype).eps * exact.abs().max().item()
    allowed = FACTOR * (largest_error(usual, exact) + rounding)
    return Checked(largest_error(out, exact) / allowed, f"float64, output, {small.tokens} tokens")


def _softmax(q: Tensor, k: Tensor, v: Tensor, width: int | None) -> Tensor:
    """Softmax attention by its definition. [B, H, T, d] and [B, G, T, d]; the last `width` keys, or all."""
    repeats, tokens = q.shape[1] // k.shape[1], q.shape[2]
    keys, values = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    if width is not None:
        seen = seen.triu(1 - width)
    scores = (q @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ values
