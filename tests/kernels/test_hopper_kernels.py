"""Each kernel of the Hopper engine's states alone, against float64: in the whole, one could hide another's error."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from device import ON_GPU
from hopper_calls import (
    BOUNDS,
    FIRST,
    GROUPS,
    LAST,
    ROUNDING,
    SLOTS,
    Made,
    check_part,
    decay,
    through,
)
from torch import Tensor

from hopper_on_cpu import PACKAGE, hopper_on_cpu
from powerplan.kernels.triton.layout import steps
from powerplan.kernels.triton.running import Summands, running_sums

pytestmark = pytest.mark.skipif(
    ON_GPU, reason="with a GPU there is nothing to emulate: the other files test the engine"
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with hopper_on_cpu():
        yield importlib.import_module(f"{PACKAGE}.run")


@pytest.mark.parametrize("has_edge", [False, True])
@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(20, 24), (64, 5)])
def test_expand(engine: Any, key_dim: int, value_dim: int, of_keys: bool, has_edge: bool) -> None:
    made = Made(engine, key_dim, value_dim)
    x, states = made.k if of_keys else made.q, made.states()
    part = made.calls._through_states(engine.expand_kernel, x, None, states, of_keys, has_edge)
    factor = decay(made, of_keys)
    exact = (through(made, x.double(), states.double()) * factor)[..., :value_dim]
    # A product of two features is rounded, and so is the result; the rest is a sum of float32 numbers.
    terms = (through(made, x.double().abs(), states.double().abs()) * factor)[..., :value_dim]
    check_part(part, exact, ROUNDING * (terms + 1.01 * exact.abs()) + 2**-20 * terms, of_keys, has_edge)


@pytest.mark.parametrize("has_edge", [False, True])
@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(20, 24), (64, 5)])
def test_contract(engine: Any, key_dim: int, value_dim: int, of_keys: bool, has_edge: bool) -> None:
    made = Made(engine, key_dim, value_dim)
    x, states = made.k if of_keys else made.q, made.states()
    y = made.v if of_keys else made.normal(1, 4, value_dim)[0]
    part = made.calls._through_states(engine.contract_kernel, x, y, states, of_keys, has_edge)

    def gradient(x: Tensor, y: Tensor, states: Tensor) -> Tensor:
        x, y = x.double().requires_grad_(), torch.nn.functional.pad(y.double(), (0, made.columns - value_dim))
        (through(made, x, states.double()) * y * decay(made, of_keys)).sum().backward()
        assert x.grad is not None
        return x.grad

    exact = gradient(x, y, states)
    terms = gradient(x.abs(), y.abs(), states.abs())
    # No operand is rounded, only the result.
    check_part(part, exact, ROUNDING * 1.01 * exact.abs() + 2**-20 * terms, of_keys, has_edge)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(20, 24), (64, 64), (40, 100)])
def test_states_of_single_chunks(engine: Any, key_dim: int, value_dim: int, backward: bool) -> None:
    made = Made(engine, key_dim, value_dim)
    x, y, prepared = made.k, made.v, made.prepared
    factor = (made.total - made.since).exp()[..., None]
    if backward:
        prepared = made.backward(value_dim)
        x, y = made.q, prepared.norm_grads.y
        factor = decay(made, False)
    of = engine.chunk_summands(made.calls, x, y, prepared.copies, None, False, None, backward)
    parts = of.parts[:, :, 0]
    scaled = torch.nn.functional.pad(y.double() * factor, (0, made.columns - value_dim))
    phi = made.phi(x.double())
    assert (parts[5] == 0).all()  # the slot without a chunk
    for slot, (start, stop) in enumerate(SLOTS):
        left = phi[start:stop].unflatten(1, (GROUPS, -1))
        right = scaled[start:stop].unflatten(1, (GROUPS, -1))
        exact, terms = (torch.einsum("tghr,tghv->grv", *x) for x in ((left, right), (left.abs(), right.abs())))
        # Products of two features and scaled values are rounded, and the result.
        allowed = ROUNDING * (2.01 * terms + 1.01 * exact.abs()) + 2**-20 * terms
        # float16 has no relative rounding below 2^-14, but an absolute one of 2^-25.
        assert ((parts[slot].double() - exact).abs() <= allowed + 2**-23).all()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_running_sums(engine: Any, gated: bool, with_start: bool, backward: bool) -> None:
    made = Made(engine, 20, 24, gated)
    parts, forward, rows = made.states(torch.float32), made.states(torch.float32), made.shape.rows
    start = torch.randn(3, GROUPS, rows, 24, generator=made.make) if with_start else None
    summands = Summands(parts[:, :, None], start, forward, 24, torch.float32)
    (sums, _), (end, _), carry = running_sums(made.calls, summands, None, True, backward)
    weight = torch.tensor([step[2] for step in steps(32, 2)], dtype=torch.float64).repeat_interleave(64)[:, None]
    borders = [[0, 1], [2], [3, 4]]
    used = torch.nn.functional.pad(start, (0, 8)).double() if start is not None else parts.new_zeros(3, 1).double()
    for sequence, slots in enumerate(borders):
        total = used[sequence].expand(GROUPS, rows, 32) if start is not None else torch.zeros(GROUPS, rows, 32).double()
        if not backward:
            total = total / weight
        after = None
        for slot in reversed(slots) if backward else slots:
            if with_start or after is not None or not backward:
                # Stored with the 10 bits of fraction that float16 and tf32 have; summed without this rounding.
                torch.testing.assert_close(sums[slot].double(), total * weight, rtol=1.01 * ROUNDING, atol=2**-20)
            if backward and gated:
                share = (forward[after].double() * total).sum((1, 2)) if after is not None else torch.zeros(2).double()
                size = (forward[after].double() * total).abs().sum() if after is not None else 1.0
                torch.testing.assert_close(carry[slot].double().sum(1), share, rtol=0, atol=float(size) * 2**-20)
            decay_of_chunk = made.total[SLOTS[slot][0]].exp()[:, None, None]
            total, after = total * decay_of_chunk + parts[slot].double(), slot
        expected = total if backward else total * weight
        torch.testing.assert_close(end[sequence].double(), expected[..., :24], rtol=2**-20, atol=2**-20)
    assert (sums[5] == 0).all()


@pytest.mark.parametrize("backward", [False, True])
def test_running_sums_of_two_are_those_of_each(engine: Any, backward: bool) -> None:
    """States and normalisers in one launch, the normalisers in three pieces: bit for bit what two launches give."""
    made = Made(engine, 20, 24)

    def summands(pieces: int, *size: int) -> Summands:
        parts = torch.randn(6, GROUPS, pieces, *size, generator=made.make)
        start, forward = torch.randn(3, GROUPS, *size, generator=made.make), parts[:, :, 0] + 1
        return Summands(parts, start, forward, size[1], torch.float32)

    of, of_keys = summands(1, made.shape.rows, 32), summands(3, 32, 32)
    (sums, keys), (end, key_end), carry = running_sums(made.calls, of, of_keys, True, backward)
    alone = running_sums(made.calls, of, None, True, backward)
    keys_alone = running_sums(made.calls, of_keys, None, True, backward)
    assert torch.equal(sums, alone[0][0])
    assert torch.equal(keys, keys_alone[0][0])
    assert torch.equal(end, alone[1][0])
    assert torch.equal(key_end, keys_alone[1][0])
    if backward:
        assert carry.shape[-1] == of.blocks + of_keys.blocks
        assert torch.equal(carry[:5], torch.cat((alone[2], keys_alone[2]), -1)[:5])
        assert (carry[sorted(LAST)] == 0).all()


def test_the_chunks_are_those_that_this_file_says(engine: Any) -> None:
    table = Made(engine, 20, 24).calls.chunk_table
    assert table.chunks[:, :2].tolist() == [*map(list, SLOTS), [0, 0]]
    assert table.chunks[:5, 2].nonzero().flatten().tolist() == sorted(FIRST)
    assert table.chunks[:5, 3].nonzero().flatten().tolist() == sorted(LAST)
    assert [stop - start for start, stop in pairwise(BOUNDS)] == [70, 1, 128]
