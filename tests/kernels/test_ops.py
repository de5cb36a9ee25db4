"""The chunked operator within torch: opcheck, compile, FLOP counter, checkpointing, autocast, vmap, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from powerplan.dims import chunked_power_flops
from powerplan.kernels import power_attention
from powerplan.kernels.ops import chunked_power
from powerplan.kernels.testing import Case, arguments, results, state_of
from powerplan.mixers import Convention, Power
from powerplan.mixers.base import total


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool, with_state: bool) -> None:
    inputs = Case(gated=gated, with_state=with_state, tokens=20).inputs(torch.float32)
    state = state_of(inputs)
    whole = None if state is None or state.key is None else torch.cat((state.kv, state.key[..., None]), -1).detach()
    whole = None if whole is None else whole.requires_grad_()
    report = torch.library.opcheck(
        chunked_power, (*arguments(inputs), inputs["log_g"], whole, 2, 0.5, 8, True, True), raise_exception=True
    )
    assert set(report.values()) == {"SUCCESS"}


def test_compiles_without_graph_breaks() -> None:
    inputs = Case(tokens=40, with_state=True).inputs(torch.float32)

    def call(*given: Tensor | None) -> tuple[Tensor, Any]:
        return power_attention(*given[:4], initial_state=state_of(inputs), return_state=True, chunk_size=16)  # type: ignore

    eager = results(*call(*arguments(inputs), inputs["log_g"]), inputs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    traced = results(*compiled(*arguments(inputs), inputs["log_g"]), inputs)
    assert eager.keys() == traced.keys()
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value, msg=name)


@given(
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from([(1, False), (2, True), (3, False)]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 6),
)
def test_the_counter_the_planner_and_dims_agree(
    tokens: int, chunk: int, degree: tuple[int, bool], groups: int, repeats: int, key_dim: int, value_dim: int
) -> None:
    p, normalize = degree
    q = torch.randn(2, tokens, groups * repeats, key_dim)
    k, v = torch.randn(2, tokens, groups, key_dim), torch.randn(2, tokens, groups, value_dim)
    with FlopCounterMode(display=False) as counter:
        power_attention(q, k, v, p=p, normalize=normalize, chunk_size=chunk)
    mixer = Power(
        heads=groups * repeats,
        kv_heads=groups,
        head_dim=key_dim,
        v_head_dim=value_dim,
        p=p,
        normalize=normalize,
        chunk_size=chunk,
        tile=min(8, key_dim),
    )
    per_token = total(mixer.state_flops_terms(tokens, Convention("full", "chunked")))
    assert counter.get_total_flops() == 2 * tokens * per_token


def test_the_counter_sees_the_backward_pass() -> None:
    inputs = Case(tokens=40, batch=1).inputs()
    with FlopCounterMode(display=False) as counter:
        power_attention(*arguments(inputs), inputs["log_g"], chunk_size=16).sum().backward()
    forward = chunked_power_flops(
        40, heads=4, kv_heads=2, head_dim=8, v_head_dim=5, p=2, tile=8, chunk_size=16, normalize=True
    )
    assert counter.get_total_flops() == 3 * forward


def test_checkpointing_gives_the_same_gradients() -> None:
    inputs = Case(tokens=40).inputs()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return power_attention(q, k, v, chunk_size=16)

    plain = torch.autograd.grad(call(*arguments(inputs)).sum(), arguments(inputs))
    saved = checkpoint(call, *arguments(inputs), use_reentrant=False)
    again = torch.autograd.grad(saved.sum(), arguments(inputs))
    assert all(torch.equal(first, second) for first, second in zip(plain, again, strict=True))


def test_autocast_projections_go_straight_in() -> None:
    project = torch.nn.Linear(16, 3 * 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = project(torch.randn(1, 20, 16)).view(1, 20, 3, 2, 8).unbind(2)
        out = power_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert project.weight.grad is not None
    assert project.weight.grad.isfinite().all()


def test_vmap_is_a_loop() -> None:
    q = torch.randn(3, 1, 6, 2, 4)
    mapped = torch.func.vmap(power_attention)(q, q, q)
    assert torch.equal(mapped, torch.stack([power_attention(row, row, row) for row in q]))


def test_a_second_derivative_is_refused() -> None:
    q, k, v = arguments(Case(tokens=6, batch=1).inputs())
    (slope,) = torch.autograd.grad(power_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"chunked_power_backward|does not require grad"):
        torch.autograd.grad(slope.sum(), q)
