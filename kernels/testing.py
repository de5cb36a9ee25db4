"""Inputs, the float64 oracle, and the error budget that tests and benchmarks hold every implementation to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from powerplan.dims import spow_dim
from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.embedding import spow
from powerplan.kernels.reference import reference
from powerplan.kernels.state import PowerState

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "mild": lambda x: -0.2 * x,
    "steep": lambda x: -80 * x,
    "resets": lambda x: torch.where(x < 0.4, -torch.inf, -0.2 * x),
    "alternating": lambda x: (0 * x).index_fill(1, torch.arange(1, x.shape[1], 2, device=x.device), -torch.inf),
    "all -1e4": lambda x: torch.full_like(x, -1e4),
    "all -inf": lambda x: torch.full_like(x, -torch.inf),
}
"""The logarithms of gates, [B, T, G], by name, from uniform random numbers of that size."""


@dataclass(frozen=True)
class Case:
    """Shape and settings of one call, and its inputs, made from the seed.

    Inputs are normally distributed. With a normaliser, the first feature of queries and keys is a constant that puts
    q.k nine standard deviations above 0. Every implementation that goes through phi rounds to eps (|q| |k|)^p, and a
    sum of weights near 0 (an early token with q.k = 0) amplifies that without bound.

    `groups` are the key/value heads, `repeats` the query heads to each; key_dim and value_dim are the head dims K and
    V; `gates` is a key of GATES.
    """

    p: int = 2
    normalize: bool = True
    gated: bool = True
    with_state: bool = False
    batch: int = 2
    tokens: int = 63
    groups: int = 2
    repeats: int = 2
    key_dim: int = 8
    value_dim: int = 5
    seed: int = 0
    gates: str = "mild"

    @property
    def scale(self) -> float:
        return float(self.key_dim**-0.5)

    def inputs(self, dtype: torch.dtype = torch.float64, device: str | None = None) -> dict[str, Tensor | None]:
        """Return q, k, v, log_g, kv and key, which require gradients; None for those that the case has not got.

        q, k and v have the dtype asked for; gates and states have at least float32. They are on `device`, or on torch's
        default device, and hold the same numbers on any.
        """
        make = torch.Generator().manual_seed(self.seed)
        device = str(torch.get_default_device()) if device is None else device
        high = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int, to: torch.dtype = dtype, aligned: bool = False) -> Tensor:
            x = torch.randn(*shape, generator=make, dtype=torch.float64, device="cpu")
            if aligned and self.normalize:
                x[..., 0] = 3 * self.key_dim**0.25
            return x.to(device=device, dtype=to).requires_grad_()

        b, t, g, d = self.batch, self.tokens, self.groups, spow_dim(self.key_dim, self.p)
        q = normal(b, t, g * self.repeats, self.key_dim, aligned=True)
        k, v = normal(b, t, g, self.key_dim, aligned=True), normal(b, t, g, self.value_dim)
        uniform = torch.rand(b, t, g, generator=make, dtype=torch.float64, device="cpu")
        gates = GATES[self.gates](uniform)
        log_g = gates.to(device=device, dtype=high).requires_grad_() if self.gated else None
        kv, key = normal(b, g, d, self.value_dim, to=high), None
        if self.normalize:
            # Sums of phi(k), so that the normaliser of an even degree stays positive, as a real state keeps it.
            key = case_keys(self, make).to(device=device, dtype=high).requires_grad_()
        state = {"kv": kv, "key": key} if self.with_state else {"kv": None, "key": None}
        return {"q": q, "k": k, "v": v, "log_g": log_g, **state}


def case_keys(case: Case, make: torch.Generator) -> Tensor:
    """Return sums of phi over four keys, [B, G, D]."""
    size = (case.batch, case.groups, 4, case.key_dim)
    return spow(torch.randn(size, generator=make, dtype=torch.float64, device="cpu"), case.p).sum(2)


def state_of(inputs: dict[str, Tensor | None]) -> PowerState | None:
    """Return the initial state among `inputs`, or None."""
    return None if inputs["kv"] is None else PowerState(inputs["kv"], inputs["key"])


def arguments(inputs: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    assert q is not None
    assert k is not None
    assert v is not None
    return q, k, v


def plain(case: Case, inputs: dict[str, Tensor | None]) -> tuple[Tensor, PowerState]:
    """Return output and state by the definition, in the dtype of the inputs; in float64 that is the oracle."""
    q, k, v = arguments(inputs)
    # The definition has no chunks.
    shape = CallShape.of(q.shape, k.shape, v.shape, case.p, case.scale, case.tokens, case.normalize)
    return reference(Inputs(q, k, v, inputs["log_g"]).with_finite_gates(), state_of(inputs), shape)


def results(out: Tensor, state: PowerState, inputs: dict[str, Tensor | None], seed: int = 1) -> dict[str, Tensor]:
    """Return the output, the state's parts, and the gradients of all inputs, by name.

    The gradients are those of a sum of the output and the state with random weights, made from the seed.
    """
    make = torch.Generator().manual_seed(seed)
    parts = {"out": out, "state kv": state.kv} | ({} if state.key is None else {"state key": state.key})
    loss = out.new_zeros((), dtype=torch.float64)
    for part in parts.values():
        weight = torch.randn(part.shape, generator=make, dtype=torch.float64, device="cpu").to(part.device)
        loss = loss + (part.double() * weight).sum()
    named = {name: x for name, x in inputs.items() if x is not None}
    grads = torch.autograd.grad(loss, list(named.values()))
    return {name: part.detach() for name, part in parts.items()} | {
        f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True)
    }


def widened(case: Case, inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Return the same numbers in float64, as the oracle sees them."""
    return {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}


def product_state(case: Case, inputs: dict[str, Tensor | None]) -> PowerState:
    """Return the final state by plain torch whose products take operands in the inputs' dtype and sum in float32."""
    finite = Inputs(*arguments(inputs), inputs["log_g"]).with_finite_gates()
    k, v, log_g, state = finite.k, finite.v, finite.log_g, state_of(inputs)
    log_g_cumsum = torch.zeros(k.shape[:3]).to(k.device) if log_g is None else log_g.double().cumsum(1)
    decay_to_end = (log_g_cumsum[:, -1:] - log_g_cumsum).float().exp()
    features, values = spow(k, case.p), (v.float() * decay_to_end[..., None]).to(v.dtype)
    kv = torch.einsum("btgd,btgv->bgdv", features.float(), values.float())
    key = (features.float() * decay_to_end[..., None]).sum(1)
    if state is not None:
        decay = log_g_cumsum[:, -1].float().exp()
        kv = kv + decay[..., None, None] * state.kv
        key = key if state.key is None else key + decay[..., None] * state.key
    return PowerState(kv, key if case.normalize else None)


def budget(
    case: Case, dtype: torch.dtype, factor: float = 8.0, low_products: bool = False, device: str | None = None
) -> dict[str, float]:
    """Return the error that is allowed for each result of a case, by name.

    It is `factor` times the error of plain torch: of the definition evaluated in `dtype`, against float64 on the same
    inputs. Errors are the largest absolute ones over a tensor. Some terms are added to the error of plain torch:

    - One rounding of the tensor's largest value, since plain torch can be exact by luck. For a gradient it is the
      largest value of any gradient, since one may vanish because large terms cancel (T = 1).
    - For a state, which is a sum over T tokens, sqrt(T) such roundings: what T roundings of random signs come to. One
      is too few. The constant feature gives a sum of 300 equal terms, whose pairwise sum can be exact in float32 while
      another order of summation is 10 roundings off.

    float64 has no wider dtype to be compared with. There the error of float32 counts, times the ratio of their
    roundings.

    Args:
        case: The call.
        dtype: That of q, k and v.
        factor: How many times the error of plain torch is allowed.
        low_products: Whether the implementation's products take operands in `dtype`, those for the state too, which the
            definition computes in float32. Plain torch then does the same for the state.
        device: Where plain torch runs; None for torch's default device.
    """
    narrow = torch.float32 if dtype == torch.float64 else dtype
    inputs = case.inputs(narrow, device)
    wide = widened(case, inputs)
    out, state = plain(case, inputs)
    rounded = results(out, product_state(case, inputs) if low_products else state, inputs)
    exact = results(*plain(case, wide), wide)
    ratio = torch.finfo(dtype).eps / torch.finfo(narrow).eps
    allowed = {}
    sizes = {name: value.abs().max().item() for name, value in exact.items()}
    largest_gradient = max(size for name, size in sizes.items() if name.startswith("gradient"))
    for name, value in exact.items():
        size = largest_gradient if name.startswith("gradient") else sizes[name]
        rounding = torch.finfo(rounded[name].dtype).eps * size
        terms = case.tokens**0.5 if name.startswith("state") else 1.0
        allowed[name] = factor * ratio * (largest_error(rounded[name], value) + terms * rounding)
    return allowed


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest absolute error; infinite where the shapes differ or a value is not finite."""
    if actual.shape != exact.shape or not actual.isfinite().all():
        return float("inf")
    return (actual.double() - exact).abs().max().item()


def beyond_budget(
    case: Case,
    dtype: torch.dtype,
    actual: dict[str, Tensor],
    inputs: dict[str, Tensor | None],
    low_products: bool = False,
) -> dict[str, str]:
    """Return the results that are not within their budget, each with its error; empty if all are."""
    wide = widened(case, inputs)
    exact = results(*plain(case, wide), wide)
    assert actual.keys() == exact.keys()
    allowed = budget(case, dtype, low_products=low_products, device=str(arguments(inputs)[0].device))
    errors = {name: largest_error(actual[name], exact[name]) for name in exact}
    return {
        name: f"error {error:.3g}, allowed {allowed[name]:.3g}"
        for name, error in errors.items()
        if not error <= allowed[name]
    }


def variants(case: Case, **changes: list[Any]) -> list[Case]:
    """Return the cases that differ from `case` in one field each: for every field the values given for it."""
    return [replace(case, **{name: value}) for name, values in changes.items() for value in values]
