"""What must hold whatever the numbers: carried states, packing, permutation, degenerate gates, special cases."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from device import triton_dtypes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from powerplan.dims import tiled_spow_dim
from powerplan.kernels import PowerState, empty_state, power_attention, power_attention_step, spow, tiled_spow
from powerplan.kernels.testing import Case, arguments, state_of
from powerplan.kernels.tiles import Expander, tile_conversion, tiling

IMPLS = ["reference", "recurrent", "torch", "triton"]
CASE = Case(tokens=40, with_state=True, repeats=3)


def run(inputs: dict[str, Tensor | None], impl: str, **settings: Any) -> tuple[Tensor, PowerState]:
    """Return output and state, in chunks of 16, from the inputs' state."""
    settings = {"initial_state": state_of(inputs), "chunk_size": 16} | settings
    out, state = power_attention(*arguments(inputs), inputs["log_g"], impl=impl, return_state=True, **settings)
    return out, state


def piece(inputs: dict[str, Tensor | None], at: slice) -> dict[str, Tensor | None]:
    """Return the tokens `at` of q, k, v and log_g, without a state."""
    timed = {name: x if x is None else x[:, at] for name, x in inputs.items() if name in ("q", "k", "v", "log_g")}
    return timed | {"kv": None, "key": None}


def made(case: Case, *impls: str) -> dict[str, Tensor | None]:
    """Return inputs in float64, or in float32 where Triton takes part."""
    return case.inputs(torch.float32 if "triton" in impls else torch.float64)


def check_close(actual: Tensor, expected: Tensor) -> None:
    """Two orders of the same sums: they differ by some roundings of the largest value, 100 at most."""
    atol = 100 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cut", [1, 16, 23, 39])
def test_segments_with_a_carried_state_are_the_whole(impl: str, cut: int) -> None:
    inputs = made(CASE, impl)
    whole, end = run(inputs, impl)
    first, middle = run(piece(inputs, slice(cut)), impl, initial_state=state_of(inputs))
    second, last = run(piece(inputs, slice(cut, None)), impl, initial_state=middle)
    check_close(torch.cat((first, second), 1), whole)
    check_close(last.kv, end.kv)
    assert last.key is not None
    assert end.key is not None
    check_close(last.key, end.key)


@pytest.mark.parametrize("into", IMPLS)
@pytest.mark.parametrize("out_of", IMPLS)
def test_states_pass_between_implementations(out_of: str, into: str) -> None:
    inputs = made(CASE, out_of, into)
    whole, _ = run(inputs, "reference")
    _, middle = run(piece(inputs, slice(23)), out_of, initial_state=state_of(inputs))
    second, _ = run(piece(inputs, slice(23, None)), into, initial_state=middle)
    check_close(second, whole[:, 23:])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_row_is_its_own_sequence(impl: str) -> None:
    inputs = made(CASE, impl)
    whole, state = run(inputs, impl)
    alone = {name: None if x is None else x[1:] for name, x in inputs.items()}
    out, last = run(alone, impl)
    check_close(out, whole[1:])
    check_close(last.kv, state.kv[1:])


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_sequences_do_not_see_each_other(impl: str) -> None:
    bounds = [0, 1, 17, 40]
    inputs = made(Case(batch=1, tokens=40), impl)
    states = made(Case(batch=3, tokens=1, with_state=True), impl)
    initial = state_of(states)
    assert initial is not None
    assert initial.key is not None
    packed, ends = run(inputs, impl, cu_seqlens=torch.tensor(bounds), initial_state=initial)
    for index, (start, stop) in enumerate(pairwise(bounds)):
        own = PowerState(initial.kv[index : index + 1], initial.key[index : index + 1])
        out, end = run(piece(inputs, slice(start, stop)), impl, initial_state=own)
        check_close(packed[:, start:stop], out)
        check_close(ends.kv[index : index + 1], end.kv)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_packed_sequences_are_those_of_each(impl: str) -> None:
    bounds = [0, 3, 4, 22, 60]
    inputs = made(Case(batch=1, tokens=60), impl)
    states = made(Case(batch=4, tokens=1, with_state=True), impl)
    initial = state_of(states)
    assert initial is not None
    assert initial.key is not None
    packed = run(inputs, impl, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), initial_state=initial)
    each = []
    for index, (start, stop) in enumerate(pairwise(bounds)):
        own = PowerState(initial.kv[index : index + 1], initial.key[index : index + 1])
        each.append(run(piece(inputs, slice(start, stop)), impl, initial_state=own))
    ends = (torch.cat(parts) for parts in zip(*(end for _, end in each), strict=True))
    separate = torch.cat([out for out, _ in each], 1), PowerState(*ends)
    given = [x for x in (*inputs.values(), initial.kv, initial.key) if x is not None]
    make = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=make, device="cpu").to(x) for x in (packed[0], *packed[1])]
    gradients = [torch.autograd.grad((out, *end), given, weights) for out, end in (packed, separate)]
    for together, apart in zip(*gradients, strict=True):
        check_close(together, apart)


@pytest.mark.parametrize("impl", IMPLS)
def test_permuting_heads_commutes(impl: str) -> None:
    inputs = made(Case(tokens=40, groups=3, repeats=1), impl)
    order = torch.tensor([2, 0, 1])
    whole, _ = run(inputs, impl)
    permuted = {name: None if x is None else x[:, :, order] for name, x in inputs.items()}
    check_close(run(permuted, impl)[0], whole[:, :, order])


@pytest.mark.parametrize("impl", IMPLS)
def test_grouped_heads_are_repeated_keys_and_values(impl: str) -> None:
    inputs = made(Case(tokens=40, groups=2, repeats=3), impl)
    grouped, _ = run(inputs, impl)
    spread = {name: x if x is None or name == "q" else x.repeat_interleave(3, 2) for name, x in inputs.items()}
    check_close(run(spread, impl)[0], grouped)


@pytest.mark.parametrize("impl", IMPLS)
def test_degree_one_without_normaliser_is_linear_attention(impl: str) -> None:
    inputs = made(Case(p=1, normalize=False, gated=False, repeats=1, tokens=40), impl)
    q, k, v = arguments(inputs)
    products = torch.einsum("btgk,btgv->btgkv", k, v).cumsum(1)
    expected = torch.einsum("btgk,btgkv->btgv", q * 8**-0.5, products)
    check_close(run(inputs, impl, p=1, normalize=False)[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gate_of_one_is_no_gate(impl: str) -> None:
    inputs = made(Case(gated=False, tokens=40), impl)
    open_gate = inputs | {"log_g": torch.zeros(2, 40, 2)}
    check_close(run(open_gate, impl)[0], run(inputs, impl)[0])


@pytest.mark.parametrize("gate", [-1e3, -1e38, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_very_negative_gates_forget_and_stay_finite(impl: str, dtype: torch.dtype, gate: float) -> None:
    if impl == "triton" and dtype not in triton_dtypes():
        pytest.skip("the interpreter of triton cannot multiply bfloat16")
    inputs = Case(tokens=40).inputs(dtype) | {"log_g": torch.full((2, 40, 2), gate).requires_grad_()}
    out, state = run(inputs, impl)
    wanted = arguments(inputs)[2].repeat_interleave(2, 2)
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=1e-3)  # only the token itself is left
    assert state.kv.isfinite().all()
    gradients = torch.autograd.grad(out.float().sum(), [x for x in inputs.values() if x is not None])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_gates_below_the_lowest_count_as_the_lowest_and_have_no_gradient(impl: str) -> None:
    inputs = made(Case(batch=1, tokens=20, groups=2), impl)
    log_g = inputs["log_g"]
    assert log_g is not None
    low = log_g.detach().clone()
    low[:, 3:16:4] = torch.tensor([-100.5, -torch.inf])
    tensors = [*arguments(inputs), low.requires_grad_()]
    cut = [*arguments(inputs), low.detach().clamp(min=-100).requires_grad_()]
    outs = [run(inputs | {"log_g": gates[3]}, impl)[0] for gates in (tensors, cut)]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    weight = torch.linspace(-1, 1, outs[0].numel(), dtype=outs[0].dtype).view(outs[0].shape)
    *others, grad = torch.autograd.grad(outs[0], tensors, weight)
    *same, whole = torch.autograd.grad(outs[1], cut, weight)
    assert all(torch.equal(one, other) for one, other in zip(others, same, strict=True))
    assert torch.equal(grad, whole.masked_fill(low.detach() < -100, 0))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_sees_nothing_gets_nothing(impl: str) -> None:
    inputs = made(Case(tokens=20, gated=False), impl)
    blind = inputs | {"q": torch.zeros_like(arguments(inputs)[0]).requires_grad_()}
    out, _ = run(blind, impl)
    assert (out == 0).all()
    gradients = torch.autograd.grad(out.sum(), [x for x in blind.values() if x is not None])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("impl", ["recurrent", "triton"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("p", "normalize"), [(1, False), (2, True), (2, False), (3, False), (4, True)])
def test_steps_are_the_whole(p: int, normalize: bool, gated: bool, impl: str) -> None:
    inputs = made(Case(p=p, normalize=normalize, gated=gated, tokens=12), impl)
    inputs = {name: None if x is None else x.detach() for name, x in inputs.items()}
    whole, end = run(inputs, "reference", p=p, normalize=normalize)
    q, k, v = arguments(inputs)
    log_g = inputs["log_g"]
    state = empty_state(k, v, p, normalize)
    for token in range(12):
        settings: dict[str, Any] = {"p": p, "normalize": normalize, "impl": impl}
        gate = None if log_g is None else log_g[:, token]
        out, state = power_attention_step(q[:, token], k[:, token], v[:, token], gate, state, **settings)
        check_close(out, whole[:, token])
    check_close(state.kv, end.kv)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_the_embedding_is_the_power_of_the_product(d: int, p: int, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(3, d, generator=make, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close((spow(q, p) * spow(k, p)).sum(-1), (q * k).sum(-1) ** p)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_the_tiled_embedding_is_the_power_of_the_product(d: int, p: int, tile: int, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 3, d, generator=make, dtype=torch.float64) for _ in range(2))
    expanded = tiled_spow(q, p, tile)
    assert expanded.shape == (2, 3, tiled_spow_dim(d, p, tile))
    torch.testing.assert_close((expanded * tiled_spow(k, p, tile)).sum(-1), (q * k).sum(-1) ** p)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 200), st.integers(0, 99))
def test_tiles_are_the_embedding_in_another_order(tiles: int, tile: int, p: int, rows: int, seed: int) -> None:
    d = tiles * tile
    make = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, d, 3, generator=make, dtype=torch.float64) for _ in range(2))
    layout = tiling(d, p, tile, rows)

    def expanded(x: Tensor) -> list[Tensor]:
        expander = Expander(x, layout, x.new_empty(2 * layout.dim * 3))
        return [expander.expand(index).clone() for index in range(len(layout.blocks))]

    products = [
        (left * right).sum(1) * block.weight
        for left, right, block in zip(expanded(q), expanded(k), layout.blocks, strict=True)
    ]
    torch.testing.assert_close(sum(products), (q * k).sum(1) ** p)
    keys = torch.cat(expanded(k), 1)
    shared = spow(k.mT, p).mT
    convert = tile_conversion(d, p, tile, d, shared.device)
    torch.testing.assert_close(convert.to_rows(shared), keys)
    torch.testing.assert_close(convert.from_rows(keys), shared)
