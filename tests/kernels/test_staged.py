"""power_state: what a stretch of tokens leaves behind, against the definition, and as part of a whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from device import ON_GPU, triton_dtypes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hopper_on_cpu import hopper_on_cpu
from powerplan.kernels import PowerState, power_attention, power_state
from powerplan.kernels.state_ops import state_operator
from powerplan.kernels.testing import Case, arguments, beyond_budget, results, variants

CASE = Case(tokens=40, repeats=1)
CASES = [
    CASE,
    *variants(CASE, tokens=[1, 16, 63], groups=[1, 3], value_dim=[8], gated=[False], gates=["steep", "resets"]),
    *(Case(tokens=40, repeats=1, p=p, normalize=False) for p in (1, 2)),
    Case(tokens=40, repeats=1, p=3, normalize=False, groups=1, batch=1),
    Case(tokens=40, repeats=1, p=4, key_dim=4, groups=1, batch=1),
]
IMPLS = ["reference", "recurrent", "torch", "triton"]


def stated(case: Case, inputs: dict[str, Tensor | None], **settings: Any) -> tuple[PowerState, Tensor]:
    _, k, v = arguments(inputs)
    settings = {"p": case.p, "normalize": case.normalize, "chunk_size": 16} | settings
    return power_state(k, v, inputs["log_g"], **settings)


def check(case: Case, dtype: torch.dtype, **settings: Any) -> None:
    """Hold state and gradients to the budget of a whole call, whose output the state stands beside."""
    inputs = case.inputs(dtype)
    q, _, v = arguments(inputs)
    out = q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * q.sum()
    state, _ = stated(case, inputs, **settings)
    silent = {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    silent["q"] = torch.zeros_like(q).requires_grad_()
    low = settings.get("impl") == "triton" and dtype != torch.float32
    beyond = beyond_budget(case, dtype, results(out, state, inputs), silent, low_products=low)
    beyond.pop("gradient of q", None)  # The definition has one at q = 0 where p is 1; a state knows no queries.
    assert beyond == {}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_state_and_gradients(case: Case, impl: str) -> None:
    # Where gates are -100, sums of them in the oracle's float64 are no better than those of an implementation in it.
    high = (torch.float64,) if case.gates == "mild" else ()
    for dtype in triton_dtypes() if impl == "triton" else (*high, torch.float32, torch.bfloat16):
        check(case, dtype, impl=impl)


@pytest.mark.skipif(ON_GPU, reason="with a GPU there is nothing to emulate")
def test_the_hopper_engine() -> None:
    with hopper_on_cpu():
        case = Case(tokens=130, batch=1, groups=1, repeats=1, key_dim=20, value_dim=24)
        linear = replace(case, p=1, normalize=False)
        for one in (case, *variants(case, gated=[False], tokens=[63], normalize=[False]), linear):
            check(one, torch.float16, impl="triton", chunk_size=64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gated", [False, True])
def test_a_call_returns_this_state_plus_the_decay_times_its_initial_state(impl: str, gated: bool) -> None:
    case = Case(with_state=True, gated=gated)
    inputs = case.inputs(torch.float32)
    q, k, v = arguments(inputs)
    settings: dict[str, Any] = {"chunk_size": 16, "impl": impl}
    state, decay = power_state(k, v, inputs["log_g"], **settings)
    assert decay.shape == (2, 2)
    if not gated:
        assert bool((decay == 1).all())
    kv, key = inputs["kv"], inputs["key"]
    assert kv is not None
    assert key is not None
    assert state.key is not None
    initial = PowerState(kv, key)
    _, end = power_attention(q, k, v, inputs["log_g"], initial_state=initial, return_state=True, **settings)
    for mine, whole in (
        (state.kv + decay[..., None, None] * kv, end.kv),
        (state.key + decay[..., None] * key, end.key),
    ):
        torch.testing.assert_close(mine, whole, rtol=0, atol=20 * 2.0**-23 * whole.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_is_separate(impl: str) -> None:
    inputs = Case(batch=1, tokens=70).inputs(torch.float32)
    _, k, v = arguments(inputs)
    log_g = inputs["log_g"]
    assert log_g is not None
    bounds = [0, 1, 40, 70]
    settings: dict[str, Any] = {"chunk_size": 16, "impl": impl}

    def gradients(state: list[Tensor]) -> tuple[Tensor, ...]:
        weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(0)) for part in state]
        loss = torch.stack([(part * weight).sum() for part, weight in zip(state, weights, strict=True)]).sum()
        return torch.autograd.grad(loss, (k, v, log_g))

    state, decay = power_state(k, v, log_g, cu_seqlens=torch.tensor(bounds), **settings)
    parts = [slice(start, stop) for start, stop in pairwise(bounds)]
    alone = [power_state(k[:, part], v[:, part], log_g[:, part], **settings) for part in parts]
    joined = [torch.cat(x) for x in zip(*((one.kv, one.key, own) for one, own in alone), strict=True)]
    whole = [x for x in (*state, decay) if x is not None]
    torch.testing.assert_close(whole, joined)
    torch.testing.assert_close(gradients(whole), gradients(joined))


def loss_of(k: Tensor, v: Tensor, log_g: Tensor | None, **settings: Any) -> Tensor:
    state, decay = power_state(k, v, log_g, chunk_size=16, **settings)
    assert state.key is not None
    return state.kv.square().sum() + state.key.square().sum() + decay.sum()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("gated", [False, True])
def test_traces_give_the_same(impl: str, gated: bool, packed: bool) -> None:
    inputs = Case(tokens=40, batch=1, gated=gated).inputs(torch.float32)
    given = [x for x in (*arguments(inputs)[1:], inputs["log_g"]) if x is not None]
    settings: dict[str, Any] = {"impl": impl, "cu_seqlens": torch.tensor([0, 13, 40]) if packed else None}

    def function(*given: Tensor) -> Tensor:
        return loss_of(*given[:2], given[2] if gated else None, **settings)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = function(*given), compiled(*given)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, given), torch.autograd.grad(expected, given))


@pytest.mark.parametrize("gated", [False, True])
def test_the_operator_is_one_of_torch_library(gated: bool) -> None:
    inputs = Case(tokens=40, gated=gated).inputs(torch.float32)
    _, k, v = arguments(inputs)
    torch.library.opcheck(state_operator, (k, v, inputs["log_g"], None, 2, 16, True, "torch"))


@pytest.mark.parametrize("later", [False, True])
def test_flops_are_those_of_updating_the_state(later: bool) -> None:
    """Forward once, and backward twice; a mode that is on in the backward pass alone counts that one."""
    inputs = Case(tokens=40).inputs(torch.float32)
    _, k, v = arguments(inputs)
    each = 2 * 2 * 40 * 2 * 64 * 6  # 2 B T G D W, with D = 8^2 in one tile of 8 features
    if later:
        loss = loss_of(k, v, inputs["log_g"])
    with FlopCounterMode(display=False) as counter:
        if not later:
            loss = loss_of(k, v, inputs["log_g"])
        loss.backward()  # type: ignore[no-untyped-call]
    assert counter.get_total_flops() == (2 if later else 3) * each


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at its first jvp
def test_second_and_forward_derivatives_are_errors() -> None:
    _, k, v = arguments(Case().inputs(torch.float32))
    state, _ = power_state(k, v)
    (grad,) = torch.autograd.grad(state.kv.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivatives"):
        grad.sum().backward()
    with pytest.raises(ValueError, match="impl='torch' has no forward-mode derivatives"):
        torch.func.jvp(lambda x: power_state(x, v)[0].kv, (k,), (k,))
    with pytest.raises(ValueError, match=r"impl='torch' has no gradients by torch.func"):
        torch.func.grad(lambda x: power_state(x, v)[0].kv.sum())(k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": [1.0]}, "k must be a tensor, and is list"),
        ({"v": torch.ones(1, 5, 2, 5)}, r"shapes must be k \[B, T, G, K\], v .* k \[1, 6, 2, 8\], v \[1, 5, 2, 5\]"),
        ({"p": 3}, "p=3 gives weights of both signs"),
        ({"p": 5}, "p must be 1, 2, 3 or 4, and is 5"),
        ({"log_g": torch.ones(1, 6, 2)}, "log_g must be at most 0"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must rise from 0 to 6, the length of k, and ends with 5"),
        ({"impl": "fast"}, "impl must be auto, reference, recurrent, torch, triton, and is 'fast'"),
        ({"normalize": 1}, "normalize must be True or False, and is 1"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    settings = {"k": torch.ones(1, 6, 2, 8), "v": torch.ones(1, 6, 2, 5)} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        power_state(**settings)
