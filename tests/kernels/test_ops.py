"""The chunked operator within torch: opcheck, compile, FLOP counter, checkpointing, autocast, vmap, memory."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from device import triton_dtypes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from powerplan.dims import chunked_power_flops
from powerplan.kernels import empty_state, power_attention, power_attention_step
from powerplan.kernels.ops import chunked_power, power_step
from powerplan.kernels.testing import Case, arguments, results, state_of
from powerplan.mixers import Convention, Power
from powerplan.mixers.formulas import total

ENGINES = ["torch", "triton"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool, with_state: bool, packed: bool, engine: str) -> None:
    case = Case(gated=gated, with_state=with_state, tokens=20, batch=1 if packed else 2, groups=1)
    inputs = case.inputs(torch.float32)
    state, bounds = state_of(inputs), torch.tensor([0, 20]) if packed else None
    whole = None if state is None or state.key is None else torch.cat((state.kv, state.key[..., None]), -1).detach()
    whole = None if whole is None else whole.requires_grad_()
    # The interpreter takes seconds for a check: one of both ways there.
    for return_state in (False, True) if engine == "torch" else (gated != packed,):
        report = torch.library.opcheck(
            chunked_power,
            (*arguments(inputs), inputs["log_g"], whole, bounds, 2, 0.5, 8, True, True, return_state, engine),
            raise_exception=True,
        )
        assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck_of_a_step(normalize: bool) -> None:
    inputs = {name: None if x is None else x.detach() for name, x in Case(tokens=1).inputs(torch.float32).items()}
    q, k, v = (x[:, 0] for x in arguments(inputs))
    state = empty_state(k[:, None], v[:, None], 2)
    assert state.key is not None
    key = state.key if normalize else state.key.new_empty(0)
    report = torch.library.opcheck(power_step, (q, k, v, None, state.kv, key, 2, 0.5), raise_exception=True)
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize("impl", ["recurrent", "triton"])
def test_a_step_compiles_without_graph_breaks(impl: str) -> None:
    inputs = {name: None if x is None else x.detach() for name, x in Case(tokens=1).inputs(torch.float32).items()}
    q, k, v = (x[:, 0] for x in arguments(inputs))
    log_g = inputs["log_g"]
    assert log_g is not None
    state = empty_state(k[:, None], v[:, None], 2)
    eager = power_attention_step(q, k, v, log_g[:, 0], state, impl=impl)
    compiled = torch.compile(power_attention_step, fullgraph=True, backend="aot_eager")
    traced = compiled(q, k, v, log_g[:, 0], state, impl=impl)
    torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("engine", ENGINES)
def test_packed_sequences_compile_without_graph_breaks(engine: str) -> None:
    inputs = Case(tokens=30, batch=1, groups=1).inputs(torch.float32)

    def call(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        out = power_attention(q, k, v, inputs["log_g"], cu_seqlens=bounds, chunk_size=16, impl=engine)
        assert isinstance(out, Tensor)
        return out

    bounds = torch.tensor([0, 7, 30], dtype=torch.int32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, traced = (
        torch.autograd.grad(function(*arguments(inputs), bounds).square().sum(), arguments(inputs))
        for function in (call, compiled)
    )
    torch.testing.assert_close(traced, eager)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own, at its first import
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor compiles C++, and there is no g++")
    inputs = Case(tokens=40, with_state=True).inputs(torch.float32)
    # Inputs as projections leave them: their strides are not those of a fresh tensor.
    for name in ("q", "k", "v", "log_g"):
        x = inputs[name]
        assert x is not None
        inputs[name] = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()

    def call(*given: Tensor | None) -> tuple[Tensor, Any]:
        return power_attention(*given[:4], initial_state=state_of(inputs), return_state=True, chunk_size=16)  # type: ignore

    eager = results(*call(*arguments(inputs), inputs["log_g"]), inputs)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    traced = results(*compiled(*arguments(inputs), inputs["log_g"]), inputs)
    assert eager.keys() == traced.keys()
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value, msg=name)


@given(
    st.integers(1, 300),
    st.none() | st.integers(1, 20),
    st.sampled_from([(1, False), (2, True), (3, False)]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 6),
)
def test_the_counter_the_planner_and_dims_agree(
    tokens: int, chunk: int | None, degree: tuple[int, bool], groups: int, repeats: int, key_dim: int, value_dim: int
) -> None:
    p, normalize = degree
    q = torch.randn(2, tokens, groups * repeats, key_dim)
    k, v = torch.randn(2, tokens, groups, key_dim), torch.randn(2, tokens, groups, value_dim)
    settings: dict[str, Any] = {"p": p, "normalize": normalize, "chunk_size": chunk}
    with FlopCounterMode(display=False) as counter:
        power_attention(q, k, v, **settings, return_state=True)
    with FlopCounterMode(display=False) as without:
        power_attention(q, k, v, **settings)
    mixer = Power(
        heads=groups * repeats,
        kv_heads=groups,
        head_dim=key_dim,
        v_head_dim=value_dim,
        p=p,
        normalize=normalize,
        chunk_size=chunk,
    )
    terms = mixer.state_flops_terms(tokens, Convention("full", "chunked"))
    assert counter.get_total_flops() == 2 * tokens * total(terms)
    # The last chunk is added only to a state that is asked for.
    size = mixer.effective_chunk_size()
    (update,) = [term.value for term in terms if "update state" in term.component]
    assert without.get_total_flops() == 2 * (tokens * total(terms) - (tokens % size or size) * update)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("with_state", [False, True])
def test_the_counter_sees_the_backward_pass(with_state: bool, engine: str) -> None:
    inputs = Case(tokens=40, batch=1, with_state=with_state).inputs(torch.float32)
    settings: dict[str, Any] = {"initial_state": state_of(inputs), "chunk_size": 16, "impl": engine}
    shape: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8, "v_head_dim": 5, "p": 2, "tile": 8}
    shape |= {"chunk_size": 16, "has_initial_state": with_state}
    whole, unread = (chunked_power_flops(40, **shape, return_state=wanted) for wanted in (True, False))
    with FlopCounterMode(display=False) as counter:
        power_attention(*arguments(inputs), inputs["log_g"], **settings).sum().backward()
    assert counter.get_total_flops() == 3 * unread
    # A state that has no part in the loss is computed, and nothing comes back through its last chunk.
    with FlopCounterMode(display=False) as counter:
        out, state = power_attention(*arguments(inputs), inputs["log_g"], **settings, return_state=True)
        out.sum().backward()
    assert counter.get_total_flops() == whole + 2 * unread
    with FlopCounterMode(display=False) as counter:
        out, state = power_attention(*arguments(inputs), inputs["log_g"], **settings, return_state=True)
        (out.sum() + state.kv.sum()).backward()
    assert counter.get_total_flops() == 3 * whole


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("return_state", [False, True])
def test_a_call_without_gradients(return_state: bool, engine: str) -> None:
    """Nothing is saved then: the outputs that nobody wants are empty, and none shares its memory with another."""
    q, k, v = (x.detach() for x in arguments(Case(tokens=20, batch=1, groups=1).inputs(torch.float32)))
    settings = (None, None, None, 2, 0.5, 8, True, False, return_state, engine)
    out, final_state, _, *saved = chunked_power(q, k, v, *settings)
    assert out.shape == (1, 20, 2, 5)
    assert [x.numel() for x in saved] == [0, 0, 0]
    assert bool(final_state.numel()) == return_state


def test_no_state_work_in_the_first_chunk_that_is_also_the_last() -> None:
    """QK^T and AV of 12 tokens, 2 heads, in full squares: 2 * 2 * (8 + 5) * 12^2, and nothing else."""
    shape: dict[str, Any] = {"heads": 2, "kv_heads": 2, "head_dim": 8, "v_head_dim": 5, "p": 2, "tile": 8}
    assert chunked_power_flops(12, **shape, chunk_size=12, return_state=False) == 2 * 2 * (8 + 5) * 12**2
    # Of 40 tokens in chunks of 12 the last 4 are not added, and 28 ask: D (V + 1) is 64 * 6.
    within = 2 * 2 * (8 + 5) * (3 * 12**2 + 4**2)
    assert chunked_power_flops(40, **shape, chunk_size=12, return_state=False) == within + 2 * 64 * 6 * 2 * (28 + 36)


def test_checkpointing_gives_the_same_gradients() -> None:
    inputs = Case(tokens=40).inputs()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return power_attention(q, k, v, chunk_size=16)

    plain = torch.autograd.grad(call(*arguments(inputs)).sum(), arguments(inputs))
    saved = checkpoint(call, *arguments(inputs), use_reentrant=False)
    again = torch.autograd.grad(saved.sum(), arguments(inputs))
    assert all(torch.equal(first, second) for first, second in zip(plain, again, strict=True))


@pytest.mark.parametrize("impl", ["reference", "recurrent", "torch", "triton"])
def test_autocast_changes_nothing_inside(impl: str) -> None:
    if impl == "triton" and torch.bfloat16 not in triton_dtypes():
        pytest.skip("the interpreter of triton cannot multiply bfloat16")
    project = torch.nn.Linear(16, 3 * 16)
    x = torch.randn(1, 50, 16)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        q, k, v = (part.detach().requires_grad_() for part in project(x).view(1, 50, 3, 2, 8).unbind(2))
        out, state = power_attention(q, k, v, chunk_size=16, impl=impl, return_state=True)
    gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert out.dtype == q.dtype == torch.bfloat16
    assert state.kv.dtype == torch.float32
    plain, outside = power_attention(q, k, v, chunk_size=16, impl=impl, return_state=True)
    assert torch.equal(out, plain)
    assert torch.equal(state.kv, outside.kv)
    again = torch.autograd.grad(plain.float().sum(), (q, k, v))
    assert all(torch.equal(first, second) for first, second in zip(gradients, again, strict=True))


def test_vmap_is_a_loop() -> None:
    q = torch.randn(3, 1, 6, 2, 4)
    log_g = -torch.rand(3, 1, 6, 2)
    mapped = torch.func.vmap(power_attention)(q, q, q, log_g)
    assert torch.equal(mapped, torch.stack([power_attention(x, x, x, g) for x, g in zip(q, log_g, strict=True)]))
