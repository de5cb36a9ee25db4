"""The Hopper engine in emulation: against the definition in float64, and what must hold bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from device import ON_GPU
from torch import Tensor

from hopper_on_cpu import hopper_on_cpu
from powerplan.kernels import power_attention
from powerplan.kernels.state import PowerState
from powerplan.kernels.testing import (
    Case,
    arguments,
    beyond_budget,
    budget,
    largest_error,
    plain,
    results,
    state_of,
    variants,
    widened,
)

pytestmark = pytest.mark.skipif(
    ON_GPU, reason="with a GPU there is nothing to emulate: the other files test the engine"
)

SMALL = Case(tokens=130, batch=1, groups=1, repeats=1, key_dim=20, value_dim=24, with_state=True)
"""Three chunks of 64, the last of 2 tokens; head dims that are padded to 32."""


LINEAR = replace(SMALL, p=1, normalize=False)
"""The same for p = 1, whose state is read by the kernels of attention within the chunk themselves."""


@pytest.fixture(scope="module", autouse=True)
def _emulated() -> Iterator[None]:
    with hopper_on_cpu():
        yield


def call(case: Case, inputs: dict[str, Tensor | None], chunk: int = 64, **settings: Any) -> Any:
    settings = {
        "p": case.p,
        "initial_state": state_of(inputs),
        "normalize": case.normalize,
        "return_state": True,
        "impl": "triton",
    } | settings
    return power_attention(*arguments(inputs), inputs["log_g"], chunk_size=chunk, **settings)


def check(case: Case, chunk: int = 64, dtype: torch.dtype = torch.float16) -> None:
    inputs = case.inputs(dtype)
    assert beyond_budget(case, dtype, results(*call(case, inputs, chunk), inputs), inputs, low_products=True) == {}


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gates_normaliser_and_states(gated: bool, normalize: bool, with_state: bool) -> None:
    check(replace(SMALL, gated=gated, normalize=normalize, with_state=with_state, repeats=2, key_dim=8, value_dim=5))


@pytest.mark.parametrize(
    "case",
    [
        replace(LINEAR, repeats=2, key_dim=8, value_dim=5),
        replace(LINEAR, gated=False),
        replace(LINEAR, with_state=False, groups=2, batch=2, tokens=65),
        replace(LINEAR, gated=False, with_state=False, tokens=63),
        replace(LINEAR, tokens=300, key_dim=64, value_dim=100),
        replace(LINEAR, tokens=300, key_dim=33, value_dim=1),
    ],
    ids=str,
)
def test_linear(case: Case) -> None:
    check(case, 128 if case.tokens == 300 else 64)


def test_linear_in_the_dtype_that_is_shipped() -> None:
    check(replace(LINEAR, repeats=2, key_dim=100), 128, torch.bfloat16)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_dtype_that_is_shipped(normalize: bool) -> None:
    check(replace(SMALL, gated=normalize, normalize=normalize, repeats=2), dtype=torch.bfloat16)


@pytest.mark.parametrize("tokens", [63, 64, 65, 300])
def test_lengths(tokens: int) -> None:
    check(replace(SMALL, tokens=tokens))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_one_token(seed: int, with_state: bool) -> None:
    """All but the gradient of its gate is within the budget.

    The definition multiplies one float32 state by this gate, and gets its gradient without a rounding to 16 bits. Here
    it is the difference of q.dq and k.dk, and can be 0: what is held is its error against their terms.
    """
    case = replace(SMALL, tokens=1, with_state=with_state, seed=seed)
    inputs = case.inputs(torch.float16)
    found = results(*call(case, inputs), inputs)
    assert beyond_budget(case, torch.float16, found, inputs, low_products=True).keys() <= {"gradient of log_g"}
    wide = widened(case, inputs)
    exact = results(*plain(case, wide), wide)
    q, k, _ = arguments(wide)
    terms = (q * exact["gradient of q"]).abs().sum() + (k * exact["gradient of k"]).abs().sum()
    error = largest_error(found["gradient of log_g"], exact["gradient of log_g"])
    assert error <= torch.finfo(torch.float16).eps / 2 * terms.item()


@pytest.mark.parametrize(("tokens", "chunk"), [(40, 16), (130, 100), (300, 100), (130, 128), (300, 128)])
def test_chunks_that_are_no_block(tokens: int, chunk: int) -> None:
    """Chunks of 16 are shorter than a block of 64 tokens, those of 100 end within one, and those of 128 have two."""
    check(replace(SMALL, tokens=tokens, key_dim=8), chunk)


@pytest.mark.parametrize(
    "case", variants(replace(SMALL, tokens=100), key_dim=[1, 8, 40], value_dim=[1, 5, 64, 128], repeats=[2, 3]), ids=str
)
def test_head_dims_and_groups(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (100, 24), (128, 64), (64, 128), (128, 128)])
def test_head_dims_of_models(key_dim: int, value_dim: int) -> None:
    check(replace(SMALL, tokens=150, key_dim=key_dim, value_dim=value_dim), 128)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [65, 130])
def test_rows_of_a_batch_do_not_see_each_other(tokens: int, gated: bool) -> None:
    """In memory a row's last block goes on into the next row, whose queries come after these keys."""
    case = replace(SMALL, tokens=tokens, batch=2, gated=gated, normalize=False, with_state=False)
    inputs = case.inputs(torch.float16)
    out, state = call(case, inputs)
    assert beyond_budget(case, torch.float16, results(out, state, inputs), inputs, low_products=True) == {}
    for row in range(2):
        own = {name: None if x is None else x[row : row + 1] for name, x in inputs.items()}
        alone, end = call(case, own)
        assert torch.equal(alone, out[row : row + 1])
        assert torch.equal(end.kv, state.kv[row : row + 1])


@pytest.mark.parametrize(
    "settings",
    [
        {"repeats": 2},
        {"gated": False},
        {"gated": False, "normalize": False},
        {"p": 1, "normalize": False},
    ],
    ids=str,
)
def test_packed_sequences_are_those_of_each(settings: dict[str, Any]) -> None:
    """Bit for bit, gradients too: the same products, whatever lies before and behind a sequence."""
    bounds = [0, 1, 64, 128, 328]  # sequences of 1, 63, 64 and 200 tokens
    case = replace(SMALL, tokens=bounds[-1], key_dim=8, with_state=False, **settings)
    inputs = case.inputs(torch.float16)
    starts = state_of(replace(case, batch=4, tokens=1, with_state=True).inputs(torch.float16))
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


@pytest.mark.parametrize(("case", "cut"), [(SMALL, 64), (SMALL, 100), (LINEAR, 100)], ids=str)
def test_segments_with_a_carried_state_are_the_whole(case: Case, cut: int) -> None:
    case = replace(case, tokens=200)
    inputs = case.inputs(torch.float16)
    timed = ("q", "k", "v", "log_g")

    def piece(at: slice) -> dict[str, Tensor | None]:
        return {name: x[:, at] if x is not None and name in timed else None for name, x in inputs.items()}

    first, middle = call(case, piece(slice(cut)), initial_state=state_of(inputs))
    second, end = call(case, piece(slice(cut, None)), initial_state=middle)
    parts = results(torch.cat((first, second), 1), end, inputs)
    assert beyond_budget(case, torch.float16, parts, inputs, low_products=True) == {}


def test_permuting_heads_commutes() -> None:
    case = replace(SMALL, groups=3)
    inputs = case.inputs(torch.float16)
    order = torch.tensor([2, 0, 1])
    permuted = {
        name: x if x is None else x[:, order] if name in ("kv", "key") else x[:, :, order] for name, x in inputs.items()
    }
    out, state = call(case, inputs)
    permuted_out, permuted_state = call(case, permuted)
    assert torch.equal(permuted_out, out[:, :, order])
    assert torch.equal(permuted_state.kv, state.kv[:, order])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "fused": lambda x: torch.cat((x, x + 1, x - 1), 2)[:, :, 2:4],
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second head": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "features last but one": lambda x: x.mT.contiguous().mT,
    "not aligned": lambda x: torch.nn.functional.pad(x, (1, 7))[..., 1:33],
}


@pytest.mark.parametrize(("view", "batch"), [*((view, 1) for view in VIEWS), ("heads first", 2)])
def test_strides_change_nothing(view: str, batch: int) -> None:
    case = Case(tokens=66, batch=batch, groups=2, repeats=1, key_dim=32, value_dim=32, gated=False)
    inputs = case.inputs(torch.float16)
    strided = dict(inputs)
    for name in ("q", "k", "v"):
        x = inputs[name]
        assert x is not None
        changed = VIEWS[view](x.detach())
        assert changed.stride() != x.stride()
        assert view == "fused" or torch.equal(changed, x)
        strided[name] = changed.requires_grad_()
    copied = {name: None if x is None else x.detach().contiguous().requires_grad_() for name, x in strided.items()}
    expected = results(*call(case, copied), copied)
    for name, value in results(*call(case, strided), strided).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("case", [*variants(SMALL, with_state=[False, True], normalize=[False]), LINEAR], ids=str)
def test_a_state_that_nobody_uses(case: Case) -> None:
    """Without a gradient of the final state, gradients are those of the output alone, whether it is returned or not."""
    inputs = case.inputs(torch.float16)
    wide = widened(case, inputs)
    exact = results(*unused(plain(case, wide)), wide)
    found = results(*unused(call(case, inputs)), inputs)
    allowed = budget(case, torch.float16, low_products=True)
    errors = {name: largest_error(found[name], value) for name, value in exact.items()}
    assert {name: error for name, error in errors.items() if not error <= allowed[name]} == {}
    alone = call(case, inputs, return_state=False)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, found["out"])


def unused(returned: tuple[Tensor, PowerState]) -> tuple[Tensor, PowerState]:
    """Return the same, with a state that no gradient flows back from."""
    out, state = returned
    return out, PowerState(state.kv.detach(), None if state.key is None else state.key.detach())


def test_a_start_without_a_gradient() -> None:
    inputs = SMALL.inputs(torch.float16)
    start = state_of(inputs)
    assert start is not None
    expected = results(*call(SMALL, inputs), inputs)
    given = inputs | {"kv": None, "key": None}
    found = results(*call(SMALL, inputs, initial_state=unused((start.kv, start))[1]), given)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("gate", [-1e3, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_closed_gates_leave_the_token_itself(dtype: torch.dtype, gate: float) -> None:
    inputs = SMALL.inputs(dtype) | {"log_g": torch.full((1, 130, 1), gate).requires_grad_()}
    found = results(*call(SMALL, inputs), inputs)
    v = arguments(inputs)[2]
    torch.testing.assert_close(found["out"], v.detach(), rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert all(value.isfinite().all() for value in found.values())
    assert (found["gradient of kv"] == 0).all()
    assert (found["gradient of log_g"] == 0).all()


@pytest.mark.parametrize("case", [SMALL, LINEAR], ids=str)
def test_closed_gates_in_the_midst(case: Case) -> None:
    """Within a block and at the border of a chunk: exponents are differences of sums below -100, none above 0."""
    inputs = case.inputs(torch.float16)
    log_g = inputs["log_g"]
    assert log_g is not None
    closed = log_g.detach().clone()
    closed[:, [20, 63, 64, 70, 71, 72, 128]] = -torch.inf
    inputs["log_g"] = closed.requires_grad_()
    found = results(*call(case, inputs), inputs)
    wide = widened(case, inputs)
    wide["log_g"] = closed.detach().double().requires_grad_()
    exact = results(*call(case, wide, impl="reference"), wide)
    allowed = budget(case, torch.float16, low_products=True)
    errors = {name: largest_error(found[name], value) for name, value in exact.items()}
    assert {name: error for name, error in errors.items() if not error <= allowed[name]} == {}


def test_results_repeat_bit_for_bit() -> None:
    case = replace(SMALL, repeats=2)
    inputs = case.inputs(torch.float16)
    first, second = (results(*call(case, inputs), inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
