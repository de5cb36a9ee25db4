"""The Hopper engine at p = 3 and 4, in emulation: each of its kernels alone, and whole calls, against float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import comb
from typing import Any

import pytest
import torch
from device import ON_GPU
from hopper_calls import GROUPS, SLOTS, Made, check_part, decay, through
from torch import Tensor

from hopper_on_cpu import PACKAGE, hopper_on_cpu
from powerplan.kernels import power_attention
from powerplan.kernels.call import CallShape
from powerplan.kernels.embedding import spow
from powerplan.kernels.state import PowerState
from powerplan.kernels.testing import Case, arguments, beyond_budget, results, state_of
from powerplan.kernels.triton import shapes
from powerplan.kernels.triton.layout import steps
from powerplan.kernels.triton.normaliser import key_rows

pytestmark = pytest.mark.skipif(
    ON_GPU, reason="with a GPU there is nothing to emulate: the other files test the engine"
)

ROUNDING = 2**-8
"""Half of the distance of two bfloat16 numbers, against the smaller one."""

CPU = torch.device("cpu")

KERNELS = pytest.mark.parametrize(
    ("p", "key_dim", "value_dim", "of_keys", "has_edge"),
    [(3, 20, 24, False, True), (3, 20, 24, True, False), (4, 12, 5, True, True)],
)
"""Three tiles of features, and at p = 4 two, the last of them in part."""


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[Any]:
    with hopper_on_cpu():
        yield importlib.import_module(f"{PACKAGE}.run")


def made_call(engine: Any, p: int, key_dim: int, value_dim: int) -> Made:
    return Made(engine, key_dim, value_dim, p=p, dtype=torch.bfloat16, normalize=p == 4)


@KERNELS
def test_expand(engine: Any, p: int, key_dim: int, value_dim: int, of_keys: bool, has_edge: bool) -> None:
    made = made_call(engine, p, key_dim, value_dim)
    x, states = made.k if of_keys else made.q, made.states()
    part = made.calls._through_states(engine.expand_kernel, x, None, states, of_keys, has_edge)
    factor = decay(made, of_keys)
    exact = (through(made, x.double(), states.double()) * factor)[..., :value_dim]
    # p - 1 products are rounded, and the result; the rest is a sum of float32 numbers.
    terms = (through(made, x.double().abs(), states.double().abs()) * factor)[..., :value_dim]
    check_part(part, exact, ROUNDING * ((p - 0.99) * terms + 1.01 * exact.abs()), of_keys, has_edge)


@KERNELS
def test_contract(engine: Any, p: int, key_dim: int, value_dim: int, of_keys: bool, has_edge: bool) -> None:
    made = made_call(engine, p, key_dim, value_dim)
    x, states = made.k if of_keys else made.q, made.states()
    y = made.v if of_keys else made.normal(1, 4, value_dim)[0]
    part = made.calls._through_states(engine.contract_kernel, x, y, states, of_keys, has_edge)
    assert part.dtype == torch.float32  # with gates, whose gradients are differences of these

    def gradient(x: Tensor, y: Tensor, states: Tensor) -> Tensor:
        x, y = x.double().requires_grad_(), torch.nn.functional.pad(y.double(), (0, made.columns - value_dim))
        (through(made, x, states.double()) * y * decay(made, of_keys)).sum().backward()
        assert x.grad is not None
        return x.grad

    # No operand is rounded, and nor is the result.
    terms = gradient(x.abs(), y.abs(), states.abs())
    check_part(part, gradient(x, y, states), 2**-19 * terms, of_keys, has_edge)


@pytest.mark.parametrize("of_keys", [False, True])
def test_what_the_normaliser_adds(engine: Any, of_keys: bool) -> None:
    """Its states, of symmetric sums of products of four features, are random here, but symmetric."""
    made = made_call(engine, 4, 12, 5)
    x, states, lower = made.k if of_keys else made.q, made.states() * 0, made.calls.lower
    y = made.v if of_keys else made.normal(1, 4, 5)[0]
    rows, columns = lower.shape.rows, lower.shape.stored_columns
    sums = torch.randn(6, GROUPS, comb(15, 4), generator=made.make)
    keys = torch.zeros(6, GROUPS, rows, columns, dtype=torch.bfloat16)
    keys[..., :12] = key_rows(12, 4, 16, CPU).to_rows(sums, adjoint=False)
    part = made.calls._lower_part(x, keys, of_keys, True)
    u = torch.randn(x.shape[:2], generator=made.make)
    grad_norm = None if of_keys else u
    grad = made.calls._through_states(engine.contract_kernel, x, y, states, of_keys, True, keys, grad_norm)

    lower_made = Made(engine, 12, 12, p=3, dtype=torch.bfloat16, normalize=False)
    factor = decay(made, of_keys)
    exact, terms = (
        (through(lower_made, z, k) * factor)[..., :12]
        for z, k in ((x.double(), keys.double()), (x.double().abs(), keys.double().abs()))
    )
    allowed = ROUNDING * 2.01 * terms  # two products are rounded, and the result is not
    check_part(part, exact, allowed, of_keys, True)
    share = 4.0 if of_keys else 4 * u.double()[..., None]
    check_part(grad, share * exact, 1.01 * abs(share) * allowed, of_keys, True)
    # 4 phi_3(x) Z is the gradient of phi_4(x).z, for which Z stands, but for the rounding of Z.
    seen = x.double().requires_grad_()
    z = sums.double().repeat_interleave(x.shape[1] // GROUPS, 1)
    loss = torch.cat([(spow(seen[a:b], 4) * z[slot]).sum(-1) for slot, (a, b) in enumerate(SLOTS)]).sum()
    (from_sums,) = torch.autograd.grad(loss, seen)
    torch.testing.assert_close(
        4 * (exact / factor), from_sums, rtol=0, atol=float(4 * ROUNDING * (terms / factor).max())
    )


@pytest.mark.parametrize(
    ("p", "key_dim", "value_dim", "backward"),
    [(3, 20, 24, False), (3, 20, 24, True), (4, 12, 5, True), (3, 8, 100, True)],
)
def test_states_of_single_chunks(engine: Any, p: int, key_dim: int, value_dim: int, backward: bool) -> None:
    made = made_call(engine, p, key_dim, value_dim)
    x, y, prepared = made.k, made.v, made.prepared
    factor = (made.total - made.since).exp()[..., None]
    if backward:
        prepared = made.backward(value_dim)
        x, y = made.q, prepared.norm_grads.y
        factor = decay(made, False)
    parts = engine.chunk_summands(made.calls, x, y, prepared.copies, None, False, None, backward).parts[:, :, 0]
    scaled = torch.nn.functional.pad(y.double() * factor, (0, made.columns - value_dim))
    phi = made.phi(x.double())
    assert (parts[5] == 0).all()  # the slot without a chunk
    for slot, (start, stop) in enumerate(SLOTS):
        left = phi[start:stop].unflatten(1, (GROUPS, -1))
        right = scaled[start:stop].unflatten(1, (GROUPS, -1))
        exact, terms = (torch.einsum("tghr,tghv->grv", *x) for x in ((left, right), (left.abs(), right.abs())))
        # p - 1 products and scaled values are rounded, and the result.
        allowed = ROUNDING * ((p + 0.01) * terms + 1.01 * exact.abs())
        assert ((parts[slot].double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("backward", [False, True])
def test_states_lie_where_the_sums_of_chunks_lay(engine: Any, backward: bool) -> None:
    """Bit for bit the states of memory of their own, which they get where the ends of several sequences are wanted."""
    made = made_call(engine, 3, 8, 5)
    prepared = made.backward(5) if backward else made.prepared
    x, y = (made.q, prepared.norm_grads.y) if backward else (made.k, made.v)
    forward = (made.states(), made.calls.placeholder) if backward else None
    start = (torch.randn(3, GROUPS, made.shape.rows, 5, generator=made.make), made.calls.placeholder)
    apart, together = (
        engine.scan_chunks(made.calls, x, y, prepared, start, want_end, forward, None) for want_end in (True, False)
    )
    states, memory = (found[0][0] for found in (apart, together))
    assert states.untyped_storage().nbytes() == states.nbytes
    assert memory.untyped_storage().nbytes() == memory.nbytes * 7 // 6
    assert torch.equal(states[:5], memory[:5])
    if backward:
        assert torch.equal(apart[2][:5], together[2][:5])
    else:  # What is saved is no garbage, where there is no chunk either.
        assert memory[5].isfinite().all()


SMALL = Case(p=3, tokens=130, batch=1, groups=1, repeats=1, key_dim=9, value_dim=24, with_state=True, normalize=False)
"""Three chunks of 64, the last of 2 tokens; two tiles of features."""

FOUR = replace(SMALL, p=4, key_dim=7, normalize=True)
"""One tile; phi of 4 degrees has 64 steps of it."""


def call(case: Case, inputs: dict[str, Tensor | None], chunk: int = 64, **settings: Any) -> Any:
    settings = {"initial_state": state_of(inputs), "return_state": True} | settings
    q, k, v = arguments(inputs)
    shape = CallShape.of(q.shape, k.shape, v.shape, case.p, case.scale, chunk, case.normalize)
    assert shapes.uses_hopper(shape, q.dtype, CPU)
    return power_attention(
        q, k, v, inputs["log_g"], p=case.p, scale=case.scale, chunk_size=chunk, normalize=case.normalize,
        impl="triton", **settings
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "chunk"),
    [
        (SMALL, 64),
        (replace(SMALL, key_dim=8, value_dim=5, repeats=2, with_state=False), 128),
        (replace(SMALL, key_dim=17, gated=False, tokens=65), 64),
        (replace(SMALL, key_dim=5, value_dim=65, groups=2, tokens=101), 100),
        (replace(SMALL, tokens=1), 64),
        (replace(FOUR, repeats=2), 64),
        (replace(FOUR, key_dim=9, value_dim=5, with_state=False, tokens=66), 64),
        (replace(FOUR, gated=False, tokens=129), 128),
        (replace(FOUR, normalize=False, batch=2, tokens=41), 40),
    ],
    ids=str,
)
def test_whole_calls(case: Case, chunk: int) -> None:
    inputs = case.inputs(torch.bfloat16)
    found = results(*call(case, inputs, chunk), inputs)
    assert beyond_budget(case, torch.bfloat16, found, inputs, low_products=True) == {}


@pytest.mark.parametrize("case", [replace(SMALL, repeats=2, key_dim=8), FOUR], ids=str)
def test_packed_sequences_are_those_of_each(case: Case) -> None:
    """Bit for bit, gradients too, where the memory of states is shared with sums of chunks and where it is not."""
    bounds = [0, 1, 64, 133] if case.p == 3 else [0, 1, 67]
    case = replace(case, tokens=bounds[-1], with_state=False)
    inputs = case.inputs(torch.bfloat16)
    starts = state_of(replace(case, batch=len(bounds) - 1, tokens=1, with_state=True).inputs(torch.bfloat16))
    assert starts is not None
    packed = call(case, inputs, initial_state=starts, cu_seqlens=torch.tensor(bounds))
    each = []
    for index, (first, end) in enumerate(pairwise(bounds)):
        own = {name: None if x is None else x[:, first:end] for name, x in inputs.items()}
        start = PowerState(*(None if x is None else x[index : index + 1] for x in starts))
        each.append(call(case, own, initial_state=start))
    states = [None if parts[0] is None else torch.cat(parts) for parts in zip(*(end for _, end in each), strict=True)]
    apart = torch.cat([out for out, _ in each], 1), PowerState(*states)
    given = inputs | {"kv": starts.kv, "key": starts.key}
    expected = results(*apart, given)
    for name, value in results(*packed, given).items():
        assert torch.equal(value, expected[name]), name
    alone = call(case, inputs, initial_state=starts, cu_seqlens=torch.tensor(bounds), return_state=False)
    assert torch.equal(alone, packed[0])


@pytest.mark.parametrize("d", [3, 8, 20])
@pytest.mark.parametrize("p", [3, 4])
def test_steps_hold_every_product_as_often_as_it_has_orders(d: int, p: int) -> None:
    made = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, d, generator=made, dtype=torch.float64)
    width = -(-d // 8) * 8
    wide_q, wide_k = (torch.nn.functional.pad(x, (0, width - d)) for x in (q, k))
    total = torch.zeros((), dtype=torch.float64)
    for *fixed, lead, last, weight in steps(width, p):
        shares = wide_q * wide_k
        total += weight * shares[fixed].prod() * shares[lead : lead + 8].sum() * shares[last : last + 8].sum()
    torch.testing.assert_close(total, (q @ k) ** p)


def test_keys_of_four_degrees_are_states_of_three() -> None:
    make = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 11, generator=make, dtype=torch.float64)
    convert = key_rows(11, 4, 16, CPU)
    phi_q, phi_k = (Made.phi(_Layout, x) for x in (q, k))  # type: ignore[arg-type]
    weights = torch.tensor([step[-1] for step in steps(16, 3)]).repeat_interleave(64)[:, None]
    key, grad = spow(k, 4).sum(0), spow(q, 4).sum(0)
    state, grad_state = weights * (phi_k.mT @ k), phi_q.mT @ q
    close = {"rtol": 1e-6, "atol": 1e-6 * float(key.abs().max())}
    torch.testing.assert_close(convert.to_rows(key, adjoint=False), state, **close)
    torch.testing.assert_close(convert.from_rows(state, adjoint=False), key, **close)
    torch.testing.assert_close(convert.to_rows(grad, adjoint=True), grad_state, **close)
    torch.testing.assert_close(convert.from_rows(grad_state, adjoint=True), grad, **close)


class _Layout:
    p, width = 3, 16
