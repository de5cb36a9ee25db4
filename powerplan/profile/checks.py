"""Is the result right? Every implementation against the reference on a small shape, before anything is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from powerplan.dims import spow_dim
from powerplan.ffn import MoE
from powerplan.mixers import Attention
from powerplan.profile.plan import Contender, Plan
from powerplan.profile.result import Checked
from powerplan.profile.runs import hidden_state, layer_module, torch_dtype
from powerplan.spec import Layer

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 300
"""More than two of the chunks of 128 that a check takes, and not a multiple of them."""

CHUNK, WINDOW, STEPS, WIDTH, EXPERTS = 128, 40, 12, 256, 4
LARGEST_STATE = 60_000
"""Rows of phi that the oracle can hold for all tokens of a check; head dims past it are checked at a smaller one."""

FACTOR = 8.0
"""How many times the error of plain torch in the same dtype is allowed."""


def check_kernel(plan: Plan, contender: Contender) -> Checked:
    """Hold the output, the final state and all gradients of power or linear attention against float64."""
    from powerplan.kernels import power_attention
    from powerplan.kernels.testing import Case, arguments, budget, largest_error, plain, results, widened

    mixer: Any = contender.mixer
    dtype, d = torch_dtype(plan.dtype), _checked_dim(mixer)
    case = Case(
        p=mixer.degree,
        normalize=mixer.has_normaliser,
        gated=mixer.gated,
        batch=1,
        tokens=TOKENS if contender.impl != "recurrent" else STEPS,
        groups=1,
        repeats=mixer.heads // mixer.kv_heads,
        key_dim=d,
        value_dim=min(d, mixer.v_head_dim),
    )
    inputs = case.inputs(dtype, plan.device)
    settings: dict[str, Any] = {"p": case.p, "normalize": case.normalize, "impl": contender.impl}
    q, k, v = arguments(inputs)
    chunk = min(CHUNK, mixer.chunk_size or CHUNK)
    out, state = power_attention(q, k, v, inputs["log_g"], chunk_size=chunk, return_state=True, **settings)
    found = {name: x.cpu() for name, x in results(out, state, inputs).items()}
    wide = widened(case, case.inputs(dtype))
    exact = results(*plain(case, wide), wide)
    allowed = budget(case, dtype, low_products=contender.impl == "triton")
    share = max(largest_error(found[name], exact[name]) / allowed[name] for name in exact)
    against = f"float64, output, state and gradients, {case.tokens} tokens, head dim {d}"
    return Checked(contender.name, contender.impl, share, against)


def _checked_dim(mixer: Any) -> int:
    """Return the key head dim of a check: the mixer's, or halved, and even as RoPE needs it, until phi fits."""
    d: int = mixer.head_dim
    while spow_dim(d, mixer.degree) > LARGEST_STATE:
        d = d // 4 * 2
    return d


def check_layer(plan: Plan, contender: Contender) -> Checked:
    """Hold the layer, its mixer included, against the same weights with the definition in place of the mixer.

    Output and the gradient of the input, in float64 on the CPU; the error of the definition in the dtype is the scale.
    """
    import torch

    small, contender = _reduced(plan, contender)
    mixer: Any = contender.mixer
    tokens = STEPS if contender.impl == "recurrent" else TOKENS
    module, x = layer_module(small, contender), hidden_state(small, tokens)
    if contender.is_power:
        _align(module.mixer)

    def outcome(layer: Any, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        out = layer(x)
        (grad,) = torch.autograd.grad(
            out, x, torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        )
        return [part.detach().double().cpu() for part in (out, grad)]

    def defined(dtype: Any) -> list[Tensor]:
        layer = layer_module(small, contender, "cpu", dtype)
        layer.load_state_dict(module.state_dict())
        layer.mixer.mix = lambda q, k, v, log_g, state, keep: (definition(mixer, q, k, v, log_g), state)
        return outcome(layer, x.to("cpu", dtype))

    found, usual, exact = outcome(module, x), defined(torch_dtype(plan.dtype)), defined(torch.float64)
    eps = torch.finfo(torch_dtype(plan.dtype)).eps
    shares = []
    for ours, plain, truth in zip(found, usual, exact, strict=True):
        allowed = FACTOR * (_distance(plain, truth) + eps * float(truth.abs().max()))
        shares.append(_distance(ours, truth) / allowed)
    return Checked(
        f"layer with {contender.name}", contender.impl, max(shares), f"float64, output and gradient, {tokens} tokens"
    )


def definition(mixer: Any, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> Tensor:
    """Return what `mixer` means, with all T^2 weights. [B, T, H, K], [B, T, G, K], [B, T, G, V] -> [B, T, H, V]."""
    import torch

    if not isinstance(mixer, Attention):
        from powerplan.kernels import power_attention

        settings: dict[str, Any] = {"p": mixer.degree, "normalize": mixer.has_normaliser}
        out: Tensor = power_attention(q, k, v, log_g, impl="reference", **settings)  # type: ignore[assignment]
        return out
    repeats, tokens = mixer.heads // mixer.kv_heads, q.shape[1]
    keys, values = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    if mixer.window is not None:
        seen = seen.triu(1 - mixer.window)
    scores = torch.einsum("bthk,bshk->bhts", q, keys) * mixer.head_dim**-0.5
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)


def _align(module: Any) -> None:
    """Make a query's product with its own key positive: a sum of weights near 0 amplifies rounding without bound."""
    import torch

    groups, repeats = module.kv_heads, module.heads // module.kv_heads
    with torch.no_grad():
        for ours, theirs in zip(module.q_proj.parameters(), module.k_proj.parameters(), strict=True):
            heads = theirs.unflatten(0, (groups, 1, -1)).expand(-1, repeats, *([-1] * theirs.ndim))
            ours.copy_(heads.reshape(ours.shape))


def _reduced(plan: Plan, contender: Contender) -> tuple[Plan, Contender]:
    """Return a layer of the same make with fewer heads, a smaller hidden size and window, and head dims that fit."""
    mixer: Any = contender.mixer
    groups = min(mixer.kv_heads, 2)
    heads = {"heads": groups * min(mixer.heads // mixer.kv_heads, 4), "kv_heads": groups}
    if contender.is_power:
        d = _checked_dim(mixer)
        dims = {} if d == mixer.head_dim else {"head_dim": d, "v_head_dim": min(d, mixer.v_head_dim)}
        mixer = msgspec.structs.replace(mixer, **heads, **dims, chunk_size=CHUNK)
    else:
        mixer = msgspec.structs.replace(mixer, **heads, window=mixer.window and min(mixer.window, WINDOW))
    ffn = plan.ffn
    if ffn is not None:
        ffn = msgspec.structs.replace(ffn, intermediate_size=min(ffn.intermediate_size, WIDTH))
    if isinstance(ffn, MoE):
        # Every token takes every expert: one between two of them could go either way, by a rounding.
        shared = min(ffn.shared_intermediate_size, WIDTH)
        ffn = msgspec.structs.replace(ffn, experts=EXPERTS, top_k=EXPERTS, shared_intermediate_size=shared)
    spec = msgspec.structs.replace(plan.spec, hidden_size=min(plan.spec.hidden_size, WIDTH))
    return replace(plan, batch=1, spec=spec, layer=Layer(mixer=mixer, ffn=ffn)), replace(contender, mixer=mixer)


def _distance(found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape or not found.isfinite().all():
        return float("inf")
    return float((found - exact).abs().max())
